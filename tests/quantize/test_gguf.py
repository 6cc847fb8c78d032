from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from danube_ray.artifacts import ArtifactError
from danube_ray.config import ConfigError, ServedModel
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.model.huggingface import load_config
from danube_ray.quantize import gguf
from danube_ray.quantize.gguf import convert, converting, copy_tokenizer
from danube_ray.quantize.imatrix import ImportanceMatrix
from danube_ray.quantize.levels import LEVELS, tensor_shapes
from danube_ray.quantize.spans import write_span
from danube_ray.serve.models import entry_of
from tests.models import tiny_model, tiny_tokenizer

# Root mean square error of weights drawn from a normal distribution, as a share of their standard deviation: 1.3 times
# what llama.cpp's quantizers reach on 131,072 of them.
LARGEST_ERROR = {
    Type.F32: 0.0,
    Type.F16: 0.00027,
    Type.BF16: 0.0022,
    Type.Q8_0: 0.007,
    Type.Q6_K: 0.023,
    Type.Q5_K: 0.047,
    Type.Q4_K: 0.093,
    Type.Q4_0: 0.112,
    Type.Q3_K: 0.196,
    Type.Q2_K: 0.386,
}


def weights(model_folder):
    return {name: tensor.float().numpy() for name, tensor in load_file(model_folder / "model.safetensors").items()}


def tensors(path):
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def field(path, key):
    return GGUFReader(path).fields[key].contents()


@pytest.mark.parametrize("level", LEVELS)
def test_every_tensor_of_every_level_is_its_weight_within_its_types_error(level, wide_model_folder, tmp_path):
    facts = convert(wide_model_folder, tmp_path / "model.gguf", level)
    assert facts.fallbacks == ()
    originals, found = weights(wide_model_folder), tensors(tmp_path / "model.gguf")
    assert len(found) == len(originals)
    for key, name in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.3.self_attn.v_proj.weight", "blk.3.attn_v.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        tensor, original = found[name], originals[key]
        error = dequantize(tensor.data, tensor.tensor_type).reshape(original.shape) - original
        assert np.sqrt(np.square(error).mean()) <= LARGEST_ERROR[tensor.tensor_type] * original.std(), name


def test_bytes_of_q8_0_and_q4_0_are_those_of_ggufs_own_quantizer(wide_model_folder, tmp_path):
    original = weights(wide_model_folder)["model.layers.0.mlp.up_proj.weight"]
    for level in ("Q8_0", "Q4_0"):
        convert(wide_model_folder, tmp_path / "model.gguf", level)
        assert (tensors(tmp_path / "model.gguf")["blk.0.ffn_up.weight"].data == quantize(original, Type[level])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_any_float_type_are_read_exactly(dtype, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "model.gguf", "F32")
    found = tensors(tmp_path / "model.gguf")
    assert (found["output.weight"].data == state["lm_head.weight"].float().numpy()).all()
    assert (found["blk.1.ffn_up.weight"].data == state["model.layers.1.mlp.up_proj.weight"].float().numpy()).all()


def test_rows_that_do_not_fit_are_named(model_folder, tmp_path):
    facts = convert(model_folder, tmp_path / "model.gguf", "Q4_K_M")
    assert len(facts.fallbacks) == 16
    assert facts.histogram == {"F32": 5, "Q5_0": 13, "Q8_0": 3}
    assert facts.bytes == (tmp_path / "model.gguf").stat().st_size
    sizes = [tensor.n_bytes for tensor in GGUFReader(tmp_path / "model.gguf").tensors]
    counts = [tensor.n_elements for tensor in GGUFReader(tmp_path / "model.gguf").tensors]
    assert facts.bits_per_weight == pytest.approx(8 * sum(sizes) / sum(counts))


def test_threads_spans_and_sharding_leave_the_bytes_alone(wide_model_folder, tmp_path, monkeypatch):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2}
    sharded = tiny_model(tmp_path / "again" / wide_model_folder.name, **sizes, max_shard_size="3MB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    convert(wide_model_folder, tmp_path / "one.gguf", "Q4_K_M", num_threads=1)
    monkeypatch.setattr(gguf, "SPAN_WEIGHTS", 40 * 256)  # a head and a bit: spans must not cut heads
    convert(sharded, tmp_path / "two.gguf", "Q4_K_M", num_threads=3)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_levels_made_together_are_those_made_alone_and_read_each_weight_once(wide_model_folder, tmp_path):
    levels = ("F16", "Q4_K_M", "Q2_K")
    with converting(wide_model_folder, {level: tmp_path / level for level in levels}) as conversion:
        for span in reversed(conversion.spans):
            write_span(span)
        assert len(conversion.spans) == len(weights(wide_model_folder))
        assert not any((tmp_path / level).exists() for level in levels)
    for level in levels:
        assert convert(wide_model_folder, tmp_path / "alone.gguf", level) == conversion.facts[level]
        assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / level).read_bytes()


def test_spans_are_of_bounded_size_and_the_largest_come_first(wide_model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "SPAN_WEIGHTS", 2**15)
    with converting(wide_model_folder, {"F16": tmp_path / "model.gguf"}) as conversion:
        sizes = [span.num_weights for span in conversion.spans]
        for span in conversion.spans:
            write_span(span)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 2**15
    assert sum(sizes) == sum(weight.size for weight in weights(wide_model_folder).values())


def test_importance_changes_rounding_where_it_is_given_and_says_so(wide_model_folder, tmp_path):
    convert(wide_model_folder, tmp_path / "plain.gguf", "Q3_K_M")
    random, shapes = np.random.default_rng(0), tensor_shapes(load_config(wide_model_folder))
    columns = {name: shape[1] for name, shape in shapes.items() if name.startswith("blk.") and len(shape) == 2}
    sums = {name: (10 ** random.uniform(-2, 2, size)).astype(np.float32) for name, size in columns.items()}
    importance = ImportanceMatrix(sums, dict.fromkeys(sums, 7), ("some text",), 3, 512, "imatrix.gguf")
    convert(wide_model_folder, tmp_path / "weighed.gguf", "Q3_K_M", importance=importance)
    plain, weighed = tensors(tmp_path / "plain.gguf"), tensors(tmp_path / "weighed.gguf")
    changed = {name for name in plain if (plain[name].data != weighed[name].data).any()}
    assert changed == set(columns)
    original = weights(wide_model_folder)["model.layers.3.mlp.up_proj.weight"]
    scale, loss = sums["blk.3.ffn_up.weight"], {}
    for file, found in (("plain", plain), ("weighed", weighed)):
        tensor = found["blk.3.ffn_up.weight"]
        loss[file] = np.square(dequantize(tensor.data, tensor.tensor_type) - original) @ scale
    assert loss["weighed"].mean() < 0.9 * loss["plain"].mean()
    assert field(tmp_path / "weighed.gguf", "quantize.imatrix.entries_count") == len(columns)
    assert field(tmp_path / "weighed.gguf", "quantize.imatrix.dataset") == "some text"


def test_a_disk_that_is_too_small_for_all_levels_is_named_before_weights_are_read(
    wide_model_folder, tmp_path, monkeypatch
):
    convert(wide_model_folder, tmp_path / "F16", "F16")
    enough_for_one = (tmp_path / "F16").stat().st_size + 1000
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=enough_for_one))
    convert(wide_model_folder, tmp_path / "F16", "F16")
    files = {level: tmp_path / level for level in ("F16", "Q8_0")}
    with pytest.raises(ArtifactError, match="F16, Q8_0 of wide_model"), converting(wide_model_folder, files):
        pytest.fail("room for both was promised")
    assert [path.name for path in tmp_path.iterdir()] == ["F16"]


def test_the_tokenizer_goes_beside_the_files(model_folder, tmp_path):
    copy_tokenizer(model_folder, tmp_path)
    convert(model_folder, tmp_path / "model.gguf", "Q8_0")
    entry = entry_of(ServedModel(weights=tmp_path / "model.gguf"))
    assert entry.tokenizer.pieces == Tokenizer.load(model_folder).pieces


def test_the_header_says_what_llama_cpp_and_its_users_need(tmp_path):
    folder = tiny_model(tmp_path / "model", sliding_window=64)
    convert(folder, tmp_path / "model.gguf", "Q8_0")
    assert field(tmp_path / "model.gguf", "llama.context_length") == 64
    assert field(tmp_path / "model.gguf", "general.file_type") == 7
    assert "<|prompt|>" in field(tmp_path / "model.gguf", "tokenizer.chat_template")
    assert field(tmp_path / "model.gguf", "tokenizer.ggml.eos_token_id") == 2


def test_a_folder_that_can_not_be_converted_is_one_error_and_leaves_the_old_file(model_folder, tmp_path):
    out = tmp_path / "out" / "model.gguf"
    convert(model_folder, out, "F16")
    before = out.read_bytes()

    def broken(change):
        folder = shutil.copytree(model_folder, tmp_path / "broken", dirs_exist_ok=True)
        change(folder)
        with pytest.raises(ConfigError) as error:
            convert(folder, out, "F16")
        shutil.rmtree(folder)
        assert out.read_bytes() == before
        assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
        return str(error.value)

    def change_weights(folder, name, value):
        state = load_file(folder / "model.safetensors")
        state[name][0, 0] = value
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def without_head(folder):
        state = load_file(folder / "model.safetensors")
        del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def with_integers(folder):
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def cut(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])

    assert "tokenizer.model" in broken(lambda folder: [file.unlink() for file in folder.glob("tokenizer*")])
    assert "520 pieces" in broken(lambda folder: tiny_tokenizer(folder, vocab_size=520))
    assert "config.json" in broken(lambda folder: (folder / "config.json").unlink())
    assert "model.safetensors" in broken(lambda folder: (folder / "model.safetensors").unlink())
    assert "whole safetensors file" in broken(cut)
    assert "lm_head.weight" in broken(without_head)
    assert "type of lm_head.weight" in broken(with_integers)
    assert "blk.1.attn_q.weight" in broken(
        lambda folder: change_weights(folder, "model.layers.1.self_attn.q_proj.weight", np.nan)
    )
    assert "BF16 holds it" in broken(lambda folder: change_weights(folder, "lm_head.weight", 1e6))


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_a_weight_that_would_be_infinite_is_refused(level, wide_model_folder, tmp_path):
    folder = shutil.copytree(wide_model_folder, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.3.mlp.up_proj.weight"][0, 0] = 1e9
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"largest weight at \w+ is 1000000000\.0"):
        convert(folder, tmp_path / "model.gguf", level)
    convert(folder, tmp_path / "model.gguf", "BF16")
