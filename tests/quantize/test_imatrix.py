from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from danube_ray.config import ConfigError
from danube_ray.model.huggingface import load_config, load_model
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.imatrix import ImportanceMatrix, gather
from danube_ray.quantize.levels import tensor_shapes

TOKENS = np.random.default_rng(0).integers(3, 512, 300).astype(np.uint16)


@pytest.fixture(scope="module")
def gathered(model_folder) -> ImportanceMatrix:
    return gather(load_model(model_folder).eval(), TOKENS, 64, "noise")


def test_the_first_matrix_reads_the_normed_embeddings(gathered, model_folder):
    model = load_model(model_folder)
    with torch.inference_mode():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(TOKENS.astype(np.int64))))
    for part in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(gathered.sums[f"blk.0.{part}.weight"], x.square().sum(0).numpy(), rtol=1e-5)
    assert gathered.counts == dict.fromkeys(gathered.sums, 300)
    np.testing.assert_allclose(gathered.weights("blk.0.attn_q.weight"), x.square().mean(0).numpy(), rtol=1e-5)
    assert gathered.weights("token_embd.weight") is None


def test_every_matrix_of_a_layer_is_watched_in_our_model_and_in_transformers(gathered, model_folder):
    shapes = {name: shape for name, shape in tensor_shapes(load_config(model_folder)).items() if len(shape) == 2}
    assert {name: len(sums) for name, sums in gathered.sums.items()} == {
        name: shape[1] for name, shape in shapes.items() if name.startswith("blk.")
    }
    theirs = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    again = gather(theirs, TOKENS, 64, "noise")
    assert again.sums.keys() == gathered.sums.keys()
    for name, sums in gathered.sums.items():
        np.testing.assert_allclose(again.sums[name], sums, rtol=1e-3)
    assert not any(module._forward_pre_hooks for module in theirs.modules())


def test_the_file_is_read_back_and_has_llama_cpps_names(gathered, tmp_path):
    gathered.write(tmp_path / "imatrix.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]
    read = ImportanceMatrix.read(tmp_path / "imatrix.gguf")
    assert (read.datasets, read.num_chunks, read.chunk_tokens) == (("noise",), 5, 64)
    assert read.source == str(tmp_path / "imatrix.gguf")
    assert read.counts == gathered.counts
    assert all((read.sums[name] == gathered.sums[name]).all() for name in gathered.sums)
    reader = GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["noise"]
    assert (reader.fields["imatrix.chunk_count"].contents(), reader.fields["imatrix.chunk_size"].contents()) == (5, 64)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == [352, 1]
    assert shapes["blk.1.ffn_down.weight.counts"] == [1, 1]


def test_one_of_another_model_is_refused(gathered, model_folder, wide_model_folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"columns of blk\.0\.attn_q\.weight .* is 128, allowed is 256.*another model"
    ):
        convert(wide_model_folder, tmp_path / "model.gguf", "Q4_K_M", importance=gathered)
    fewer = {name: sums for name, sums in gathered.sums.items() if name.startswith("blk.0")}
    with pytest.raises(ConfigError, match=r"columns of blk\.1\.\w+\.weight .* is 'nothing'"):
        convert(model_folder, tmp_path / "model.gguf", "Q4_0", importance=changed(gathered, fewer))
    more = {**gathered.sums, "blk.2.attn_k.weight": gathered.sums["blk.1.attn_k.weight"]}
    with pytest.raises(ConfigError, match=r"blk\.2\.attn_k\.weight .* allowed is no such matrix"):
        convert(model_folder, tmp_path / "model.gguf", "Q4_0", importance=changed(gathered, more))
    assert list(tmp_path.iterdir()) == []


def changed(matrix, sums):
    return ImportanceMatrix(sums, dict.fromkeys(sums, 1), matrix.datasets, matrix.num_chunks, matrix.chunk_tokens)


def test_files_that_are_none_are_one_error(gathered, model_folder, tmp_path):
    path = tmp_path / "imatrix.gguf"
    with pytest.raises(ConfigError, match="is there"):
        ImportanceMatrix.read(path)
    gathered.write(path)
    whole = path.read_bytes()
    for torn in (b"", b"GGUF", whole[:100], whole[: len(whole) // 2], whole[:-40], b"x" * 5000):
        path.write_bytes(torn)
        with pytest.raises(ConfigError, match=r"imatrix\.gguf"):
            ImportanceMatrix.read(path)
    convert(model_folder, path, "F16")
    with pytest.raises(ConfigError, match="can't be read"):
        ImportanceMatrix.read(path)
    broken = {**gathered.sums, "blk.0.attn_k.weight": np.full(128, np.inf, np.float32)}
    changed(gathered, broken).write(path)
    with pytest.raises(ConfigError, match="not finite"):
        ImportanceMatrix.read(path)


def test_calibration_needs_text_and_a_sound_model(model_folder):
    model = load_model(model_folder)
    with pytest.raises(ConfigError, match="at least two"):
        gather(model, TOKENS[:1], 64, "noise")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"inputs of blk\.1\.ffn_down\.weight"):
        gather(model, TOKENS, 64, "noise")
