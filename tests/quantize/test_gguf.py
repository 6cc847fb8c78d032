from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from danube_ray.config import ConfigError
from danube_ray.data.tokenizer import Tokenizer
from danube_ray.inference.llamacpp import library
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.levels import LEVELS
from tests.models import TEXT, tiny_model, tiny_tokenizer

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


def test_rows_that_do_not_fit_are_named(model_folder, tmp_path):
    facts = convert(model_folder, tmp_path / "model.gguf", "Q4_K_M")
    assert len(facts.fallbacks) == 16
    assert facts.histogram == {"F32": 5, "Q5_0": 13, "Q8_0": 3}
    assert facts.bytes == (tmp_path / "model.gguf").stat().st_size
    sizes = [tensor.n_bytes for tensor in GGUFReader(tmp_path / "model.gguf").tensors]
    counts = [tensor.n_elements for tensor in GGUFReader(tmp_path / "model.gguf").tensors]
    assert facts.bits_per_weight == pytest.approx(8 * sum(sizes) / sum(counts))


def test_threads_and_sharding_leave_the_bytes_alone(wide_model_folder, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2}
    sharded = tiny_model(tmp_path / "again" / wide_model_folder.name, **sizes, max_shard_size="3MB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    convert(wide_model_folder, tmp_path / "one.gguf", "Q4_K_M", num_threads=1)
    convert(sharded, tmp_path / "two.gguf", "Q4_K_M", num_threads=3)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_the_header_says_what_llama_cpp_and_its_users_need(tmp_path):
    folder = tiny_model(tmp_path / "model", sliding_window=64)
    convert(folder, tmp_path / "model.gguf", "Q8_0")
    assert field(tmp_path / "model.gguf", "llama.context_length") == 64
    assert field(tmp_path / "model.gguf", "general.file_type") == 7
    assert "<|prompt|>" in field(tmp_path / "model.gguf", "tokenizer.chat_template")
    assert field(tmp_path / "model.gguf", "tokenizer.ggml.eos_token_id") == 2


def test_llama_cpp_tokenizes_as_sentencepiece_does(model_folder, tmp_path):
    convert(model_folder, tmp_path / "model.gguf", "F16")
    tokenizer, llama = Tokenizer.load(model_folder), library()
    model = llama.llama_model_load_from_file(str(tmp_path / "model.gguf").encode(), llama.llama_model_default_params())
    vocabulary = ctypes.c_void_p(llama.llama_model_get_vocab(model))
    ids = (ctypes.c_int32 * 1000)()
    for text in [*TEXT, "", " ", "two  spaces", "\ttab\nline", "Żółć 🌊", "</s> <|prompt|> as text"]:
        data = text.encode()
        count = llama.llama_tokenize(
            vocabulary, data, len(data), ids, len(ids), ctypes.c_bool(True), ctypes.c_bool(False)
        )
        assert ids[:count] == [tokenizer.bos_id, *tokenizer.encode(text)], text
    llama.llama_model_free(model)


def test_a_larger_embedding_is_padded_with_unused_pieces(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tiny_tokenizer(folder, vocab_size=400)
    convert(folder, tmp_path / "model.gguf", "F16")
    assert len(field(tmp_path / "model.gguf", "tokenizer.ggml.tokens")) == 512
    assert field(tmp_path / "model.gguf", "tokenizer.ggml.tokens")[-1] == "[PAD511]"


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

    def cut(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])

    assert "tokenizer.model" in broken(lambda folder: (folder / "tokenizer.model").unlink())
    assert "520 pieces" in broken(lambda folder: tiny_tokenizer(folder, vocab_size=520))
    assert "config.json" in broken(lambda folder: (folder / "config.json").unlink())
    assert "model.safetensors" in broken(lambda folder: (folder / "model.safetensors").unlink())
    assert "whole safetensors file" in broken(cut)
    assert "lm_head.weight" in broken(without_head)
    assert "blk.1.attn_q.weight" in broken(
        lambda folder: change_weights(folder, "model.layers.1.self_attn.q_proj.weight", np.nan)
    )
    assert "BF16 holds it" in broken(lambda folder: change_weights(folder, "lm_head.weight", 1e6))
