"""The one place that knows the xllamacpp wheel: llama.cpp's server class, and its C functions by ctypes.

The wheel is one shared object that holds llama.cpp whole and exports its C interface. The Python class covers
generation; logits and hidden states of a whole prompt, and the quantizers, are reached by name. Structs that llama.cpp
passes by value are declared with the fields that are set here first and room after them, so a field added at the end
changes nothing, and `library` checks the known defaults before anything uses them. `pyproject.toml` pins the wheel
exactly.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p

LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
GGML_LOG_LEVEL_ERROR = 4


class ContextParams(ctypes.Structure):
    """`llama_context_params`: the leading fields, in llama.cpp's order, and room for the rest."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("rest", c_int64 * 62),
    ]


class ModelParams(ctypes.Structure):
    """`llama_model_params`, passed through as llama.cpp fills it: nothing in it is changed here."""

    _fields_ = [("rest", c_int64 * 64)]


class Batch(ctypes.Structure):
    """`llama_batch`: T tokens with their positions, sequences and whether logits are wanted."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_validate_row_data": (c_bool, [c_int, c_void_p, c_size_t]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG_CALLBACK, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_n_embd_out": (c_int32, [c_void_p]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),  # freed with its model
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_text": (c_char_p, [c_void_p, c_int32]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_set_embeddings": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_embeddings": (POINTER(c_float), [c_void_p]),
}


@LOG_CALLBACK
def _log_errors(level: int, text: bytes, _: object) -> None:
    if level == GGML_LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


@functools.cache
def library() -> ctypes.CDLL:
    """llama.cpp's C functions, typed. `ImportError` when the wheel lacks one or its structs are not those declared."""
    import xllamacpp.xllamacpp as extension  # loaded as a module first: it resolves Python's own symbols

    shared_object = ctypes.CDLL(extension.__file__)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(shared_object, name, None)
        if function is None:
            raise ImportError(f"xllamacpp does not export {name}: install the version that pyproject.toml pins")
        function.restype, function.argtypes = result, arguments
    shared_object.llama_log_set(_log_errors, None)
    defaults = shared_object.llama_context_default_params()
    if (defaults.n_ctx, defaults.n_batch, defaults.n_ubatch, defaults.n_seq_max) != (512, 2048, 512, 1):
        raise ImportError("xllamacpp's llama_context_params is not the known one: install the version pinned")
    shared_object.llama_backend_init()
    return shared_object
