"""Our files against those that llama.cpp's own quantizer makes of the F32 file, byte for byte, headers and all.

`make oracle` puts llama.cpp's libraries for Linux on x86-64 into `.venv/oracle`; LLAMA_CPP_ORACLE names that folder,
and where it is set, these tests run or fail. The wheel that everything else uses leaves this function out.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import numpy as np
import pytest

from danube_ray.model.huggingface import load_config
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.imatrix import ImportanceMatrix
from danube_ray.quantize.levels import LEVELS, file_type, tensor_shapes
from tests.models import tiny_model
from tests.quantize.test_header import SCALED, with_rope
from tests.quantize.test_vocabulary import byte_tokenizer

pytestmark = pytest.mark.slow

EVERY_TYPE_FITS = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 8, "num_kv_heads": 2}
SHAPES = {
    "24 layers, 4 heads a group": {**EVERY_TYPE_FITS, "num_layers": 24},
    "8 layers, 2 heads a group": {**EVERY_TYPE_FITS, "num_layers": 8, "num_kv_heads": 4},
    "tied": {**EVERY_TYPE_FITS, "num_layers": 3, "tied_embeddings": True},
    "window": {**EVERY_TYPE_FITS, "num_layers": 1, "sliding_window": 64},
    "rows of 352": {"num_layers": 8},
    "rows of 352, tied": {"tied_embeddings": True},
    "rows of 100": {"hidden_size": 100, "head_dim": 24},
    "80 layers": {"num_layers": 80, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
}


class Override(ctypes.Structure):
    """`llama_model_kv_override`: tag 0 an integer, 3 a string; its value starts with either."""

    _fields_ = [("tag", c_int), ("key", c_char * 128), ("value", c_int64 * 16)]


class Importance(ctypes.Structure):
    """`llama_model_imatrix_data`; a list of them ends with an empty one."""

    _fields_ = [("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t)]


class QuantizeParams(ctypes.Structure):
    """`llama_model_quantize_params`, and room for what later versions add."""

    _fields_ = [
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("dry_run", c_bool),
        ("imatrix", POINTER(Importance)),
        ("kv_overrides", POINTER(Override)),
        ("rest", c_int64 * 16),
    ]


@pytest.fixture(scope="module")
def llama() -> ctypes.CDLL:
    if "LLAMA_CPP_ORACLE" not in os.environ:
        pytest.skip("needs llama.cpp's quantizer: make oracle, then LLAMA_CPP_ORACLE=.venv/oracle")
    folder = Path(os.environ["LLAMA_CPP_ORACLE"]).resolve()
    library = ctypes.CDLL(str(next(folder.glob("libllama.*so*"))))
    library.llama_log_set.argtypes = [c_void_p, c_void_p]
    silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
    library.llama_log_set(silent, None)
    library.silent = silent  # or it is freed while llama.cpp still calls it
    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.llama_model_quantize.argtypes = [c_char_p, c_char_p, POINTER(QuantizeParams)]
    library.llama_model_quantize.restype = c_uint32
    params = library.llama_model_quantize_default_params()
    assert (params.nthread, params.ftype, params.quantize_output_tensor, params.pure) == (0, 7, True, False)
    return library


def overrides(importance):
    """What `llama-quantize` adds to the header: the function leaves it to its callers."""
    values = {
        "quantize.imatrix.file": importance.source,
        "quantize.imatrix.dataset": importance.datasets[0],
        "quantize.imatrix.entries_count": len(importance.sums),
        "quantize.imatrix.chunks_count": importance.num_chunks,
    }
    made = (Override * (len(values) + 1))()
    for each, (key, value) in zip(made, values.items(), strict=False):
        each.tag, each.key = 3 if isinstance(value, str) else 0, key.encode()
        if isinstance(value, str):
            text = value.encode()[:127]
            ctypes.memmove(each.value, text, len(text))
        else:
            each.value[0] = value
    return made


def quantized(llama, source, out, level, importance):
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(file_type(level))
    if importance:
        entries = (Importance * (len(importance.sums) + 1))()
        means = {name: importance.weights(name) for name in importance.sums}
        for entry, (name, mean) in zip(entries, means.items(), strict=False):
            entry.name, entry.size, entry.data = name.encode(), len(mean), mean.ctypes.data_as(POINTER(c_float))
        params.imatrix, params.kv_overrides = entries, overrides(importance)
    assert llama.llama_model_quantize(str(source).encode(), str(out).encode(), params) == 0
    return out.read_bytes()


def some_importance(folder, file, tied):
    """A matrix whose columns count from a hundredth to a hundred times as much as others."""
    random, shapes = np.random.default_rng(0), tensor_shapes(load_config(folder), tied)
    columns = {name: size[1] for name, size in shapes.items() if len(size) == 2 and name != "token_embd.weight"}
    sums = {name: (10 ** random.uniform(-2, 2, size)).astype(np.float32) for name, size in columns.items()}
    ImportanceMatrix(sums, dict.fromkeys(sums, 7), ("some text",), 3, 512).write(file)
    return ImportanceMatrix.read(file)


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_level_is_the_file_that_llama_cpps_quantizer_makes(shape, with_importance, llama, tmp_path):
    folder = tiny_model(tmp_path / "model", **SHAPES[shape])
    convert(folder, tmp_path / "model-F32.gguf", "F32")
    tied = SHAPES[shape].get("tied_embeddings", False)
    importance = some_importance(folder, tmp_path / "imatrix.gguf", tied) if with_importance else None
    for level in LEVELS:
        convert(folder, tmp_path / "ours.gguf", level, importance=importance)
        theirs = quantized(llama, tmp_path / "model-F32.gguf", tmp_path / "theirs.gguf", level, importance)
        assert (tmp_path / "ours.gguf").read_bytes() == theirs, level


def test_a_folder_in_the_style_of_llama_3_too(llama, tmp_path):
    folder = with_rope(tiny_model(tmp_path / "model"), SCALED["llama3"])
    byte_tokenizer(folder, "llama-bpe")
    convert(folder, tmp_path / "model-F32.gguf", "F32")
    convert(folder, tmp_path / "ours.gguf", "Q4_K_M")
    theirs = quantized(llama, tmp_path / "model-F32.gguf", tmp_path / "theirs.gguf", "Q4_K_M", None)
    assert (tmp_path / "ours.gguf").read_bytes() == theirs
