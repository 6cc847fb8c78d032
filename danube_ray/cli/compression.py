"""`danube compress`: a model for GPUs, where `danube quantize` makes files for llama.cpp."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from danube_ray.artifacts import write_json
from danube_ray.cli.console import Positional, console
from danube_ray.config import require


def compress(
    model: Positional[Path],
    scheme: Literal["FP8", "W4A16"] = "FP8",
    tokens: Path | None = None,
    out: Path | None = None,
    num_windows: int = 256,
    context: int = 512,
    num_tokens: int = 16_384,
) -> None:
    """Compress a model for GPUs: FP8 or 4-bit weights, for vLLM.

    What that costs is measured. Needs llm-compressor: pip install 'danube-ray[compress]'.

    Args:
        model: the Hugging Face folder.
        scheme: FP8 (weights and activations, for H100 and later; needs no text) or W4A16 (4-bit weights by GPTQ).
        tokens: a tokens folder: W4A16 is calibrated on its training part, either is compared on its held-out part.
        out: the folder to write; None puts it beside MODEL.
        num_windows: windows of text to calibrate on.
        context: tokens a window.
        num_tokens: held-out tokens to compare on.
    """
    from danube_ray.cli.comparison import read_ids
    from danube_ray.cli.levels import print_table
    from danube_ray.inference.huggingface import HuggingFaceModel
    from danube_ray.inference.scoring import windows
    from danube_ray.model.huggingface import load_config
    from danube_ray.quantize.compressed import compress as make
    from danube_ray.quantize.measure import divergence, passages, reference_logits
    from danube_ray.report.run import QUANTIZATION

    longest = load_config(model).context_length
    require(2 <= context <= longest, "--context", context, f"2 to {longest}, the model's")
    out = out or model.with_name(f"{model.name}-{scheme.lower()}")
    calibration = []
    if scheme == "W4A16" and tokens is not None:
        training = read_ids(tokens, model, num_windows * context, held_out=False)
        calibration = [window for window in windows(training, context) if len(window) == context]
    texts = passages(read_ids(tokens, model, num_tokens), context) if tokens is not None else []
    facts = make(model, out, scheme, calibration)
    row = {
        "level": scheme,
        "file": ".",
        **asdict(facts),
        "fallbacks": [],
        "tokens_per_s": None,
        "prompt_tokens_per_s": None,
    }
    if texts:
        row |= asdict(divergence(HuggingFaceModel(out), texts, reference_logits(model, texts)))
    write_json(out / QUANTIZATION, [row])
    print_table([row])
    console.print(f"serve it with [bold]danube serve {out} --num-gpus 1[/bold]", soft_wrap=True)
