"""A Hugging Face folder compressed for GPUs: FP8, or 4-bit weights, in the compressed-tensors format that vLLM reads.

llm-compressor does the work (the extra `compress`). FP8 rounds weights by channel and activations by token while it
runs, and needs no text; 4-bit weights are found by GPTQ (Frantar et al., 2023) on calibration text. The head stays as
it is, as in training.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from danube_ray.config import ConfigError, ModelConfig, require
from danube_ray.model.huggingface import load_config
from danube_ray.quantize.gguf import copy_tokenizer

Scheme = Literal["FP8", "W4A16"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GROUP_SIZE = 128  # weights that share a 4-bit scale


@dataclass(frozen=True)
class CompressedFacts:
    """What a compression made. `bits_per_weight` counts scales, and what stays in 16 bits."""

    bytes: int
    bits_per_weight: float


def compress(
    model_folder: Path, out_folder: Path, scheme: Scheme, calibration: Sequence[Sequence[int]] = ()
) -> CompressedFacts:
    """Write `out_folder`, a Hugging Face folder that vLLM and transformers open; it appears only when it is whole.

    `calibration` are windows of token ids of one length, for W4A16; a few hundred of 512 to 2,048 ids are usual.
    `ConfigError` before work starts: a scheme or a shape that doesn't fit, a folder that is there already.
    """
    require(scheme in SCHEMES, "scheme", scheme, " or ".join(SCHEMES))
    require(not out_folder.exists(), "out", str(out_folder), "a folder that isn't there yet", "remove it first")
    config = load_config(model_folder)
    recipe = _recipe(scheme, config)
    if scheme == "W4A16":
        remedy = "name a tokens folder: --tokens"
        require(bool(calibration), "calibration text", "missing", "windows of token ids for W4A16", remedy)
        require(len(set(map(len, calibration))) == 1, "lengths of calibration windows", "several", "one length")
    out_folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out_folder.parent, prefix=f".{out_folder.name}."))
    try:
        _compress(model_folder, temporary, recipe, calibration if scheme == "W4A16" else ())
        copy_tokenizer(model_folder, temporary)
        temporary.chmod(0o755)
        temporary.rename(out_folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    num_bytes = sum(file.stat().st_size for file in out_folder.glob("*.safetensors"))
    return CompressedFacts(bytes=num_bytes, bits_per_weight=8 * num_bytes / config.num_parameters)


def _recipe(scheme: Scheme, config: ModelConfig) -> Any:
    """llm-compressor's modifier for a scheme; `ConfigError` without the package, or for rows that don't divide."""
    try:
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    except ImportError as error:
        raise ConfigError(
            "llm-compressor", "missing", "installed", f"pip install 'danube-ray[compress]' ({error})"
        ) from None
    if scheme == "FP8":
        return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    columns = {config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim}
    uneven = sorted(size for size in columns if size % GROUP_SIZE)
    require(not uneven, "row lengths at W4A16", uneven, f"multiples of {GROUP_SIZE}", "FP8 takes any")
    return GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])


def _compress(model_folder: Path, out_folder: Path, recipe: Any, calibration: Sequence[Sequence[int]]) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(
        str(model_folder), local_files_only=True, trust_remote_code=False, dtype=torch.bfloat16
    )
    given: dict[str, Any] = {}
    if calibration:
        rows = {
            "input_ids": [list(ids) for ids in calibration],
            "attention_mask": [[1] * len(ids) for ids in calibration],
        }
        given = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(calibration),
            "max_seq_length": len(calibration[0]),
        }
    oneshot(model=model, recipe=recipe, **given)
    model.save_pretrained(str(out_folder), save_compressed=True)
