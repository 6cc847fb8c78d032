"""One training step on one device: tokens a second, model FLOP utilisation, peak memory, as JSON.

    python tests/benchmarks/gpu_step.py --preset danube_1_8b --sequence-length 2048 --micro-batch 8 \
        --precision bf16 --steps 20 --out bf16.json

It runs the loop's own parts (model, precision, loss, fused AdamW, clipping) on random tokens that already lie on the
device, and needs torch alone: no Ray, no network. MFU is tokens/s * FLOP a token / the bf16 peak, for FP8 too, with
`ModelConfig.flops_per_token`: 6 FLOP a matmul weight, head included and embedding not, plus 12 * heads * head_dim a
layer for each key that the causal window lets a query see. Full-attention formulas give higher figures.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))  # a GPU machine may have the checkout and no installation

from danube_ray.artifacts import provenance, write_json
from danube_ray.config import ConfigError, ModelConfig, require
from danube_ray.model.precision import autocast, check_precision, convert
from danube_ray.model.transformer import Transformer
from danube_ray.planner import H100, USABLE, memory
from danube_ray.presets import PRESETS
from danube_ray.train.losses import cross_entropy_sum
from danube_ray.train.optimizer import build_optimizer

# Dense bf16 peaks by torch's name of the device. Other devices get no MFU unless --peak-tflops says what to divide by.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": H100.peak_flops, "NVIDIA H200": H100.peak_flops}
CLOCKS = "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
TOKENS_PER_DOCUMENT = 500  # of --packed: windows of several documents, as pretraining sees them


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="danube_1_8b", choices=PRESETS)
    parser.add_argument("--sequence-length", type=int, default=2_048)
    parser.add_argument("--micro-batch", type=int, default=8, help="windows a forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches an optimizer step")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp8-te"))
    parser.add_argument("--weights", default="auto", choices=("auto", "fp32", "bf16"), help="auto: fp32 where it fits")
    parser.add_argument("--logit-chunk-tokens", type=int, default=0, help="compute the loss in chunks; 0: in one")
    parser.add_argument("--packed", action="store_true", help="several documents a window, masked from each other")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-tflops", type=float, default=None, help="bf16 peak of a device not in the table")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, warm up, time `steps` optimizer steps; the figures with everything needed to repeat them."""
    device, run = torch.device(options.device), PRESETS[options.preset]()
    check_precision(options.precision, device)
    require(options.steps > 0, "--steps", options.steps, "greater than 0")
    require(options.warmup_steps > 0, "--warmup-steps", options.warmup_steps, "greater than 0")
    weights = weight_dtype(options, run.model, device)
    torch.manual_seed(0)
    with device:
        model = convert(Transformer(run.model).to(weights), options.precision)
    decoder = torch.compile(model.model) if options.compile else model.model
    optimizer = build_optimizer(model, run.optimizer)
    shape = (options.micro_batch, options.sequence_length + 1)
    batches = [torch.randint(0, run.model.vocab_size, shape, device=device) for _ in range(options.accumulate)]
    position = torch.arange(options.sequence_length, device=device).expand(options.micro_batch, -1)
    documents = position // TOKENS_PER_DOCUMENT if options.packed else None

    def step() -> Tensor:
        loss_sum = torch.zeros((), device=device)
        for batch in batches:
            with autocast(options.precision, device):
                hidden = decoder(batch[:, :-1], documents)
                loss = chunked_loss(model.lm_head, hidden, batch[:, 1:], options.logit_chunk_tokens)
            (loss / (batch[:, 1:].numel() * len(batches))).backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss_sum / (len(batches) * batches[0][:, 1:].numel())

    first = step().item()
    for _ in range(options.warmup_steps - 1):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, last, clocks = timed(step, options.steps, device)
    tokens_per_step = options.micro_batch * options.sequence_length * options.accumulate
    return {
        **figures(run.model, options, device, seconds, tokens_per_step),
        "weights": str(weights).removeprefix("torch."),
        "loss_before": first,
        "loss_after": last,
        "clocks": clocks,
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "processor": platform.processor() or platform.machine(),
        "provenance": provenance(),
    }


def weight_dtype(options: argparse.Namespace, model: ModelConfig, device: torch.device) -> torch.dtype:
    """fp32 weights, gradients and moments where the planner says that they fit the device, else bf16."""
    if options.weights != "auto" or device.type != "cuda":
        return torch.bfloat16 if options.weights == "bf16" else torch.float32
    needed = memory(model, options.micro_batch * options.sequence_length, half=options.precision != "fp32")
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.float32 if needed.total_bytes <= USABLE * total else torch.bfloat16


def chunked_loss(head: torch.nn.Module, hidden: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """Summed cross-entropy of hidden (B, T, E) and labels (B, T); a chunk's logits are computed again for backward."""

    def loss(hidden_part: Tensor, labels_part: Tensor) -> Tensor:
        return cross_entropy_sum(head(hidden_part)[None], labels_part[None])

    flat, targets = hidden.flatten(0, 1), labels.flatten()
    if not chunk_tokens:
        return loss(flat, targets)
    again = partial(checkpoint, loss, use_reentrant=False)
    parts = zip(flat.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    return torch.stack([again(*part) for part in parts]).sum()


def timed(
    step: Callable[[], Tensor], num_steps: int, device: torch.device
) -> tuple[list[float], float, dict[str, str]]:
    """Seconds of each step, the last loss, and the GPU's clocks as the last steps run."""
    if device.type != "cuda":
        seconds, loss = [], torch.zeros(())
        for _ in range(num_steps):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        return seconds, loss.item(), {}
    loss = torch.zeros(())
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        loss = step()
        mark.record()
    clocks = gpu_clocks()  # the queue is still full: launching runs ahead of the device
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1_000 for start, end in pairwise(marks)], loss.item(), clocks


def figures(
    model: ModelConfig, options: argparse.Namespace, device: torch.device, seconds: list[float], tokens_per_step: int
) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    peak = options.peak_tflops * 1e12 if options.peak_tflops else PEAK_FLOPS.get(name)
    tokens_per_s = tokens_per_step / statistics.median(seconds)
    flops_per_token = model.flops_per_token(options.sequence_length)
    return {
        "device": name,
        "parameters": model.num_parameters,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_mean": tokens_per_step * len(seconds) / sum(seconds),
        "step_s": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
        "flops_per_token": flops_per_token,
        "model_tflops_per_s": tokens_per_s * flops_per_token / 1e12,
        "mfu_of_bf16_peak": tokens_per_s * flops_per_token / peak if peak else None,
        "bf16_peak_flops": peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        "cuda": torch.version.cuda,
    }


def gpu_clocks() -> dict[str, str]:
    """Clocks, power and temperature from nvidia-smi; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = output.splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(CLOCKS.split(","), values, strict=True)}


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    try:
        result = measure(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    mfu, peak_memory = result["mfu_of_bf16_peak"], result["peak_memory_gib"]
    print(
        f"{options.preset} {options.precision} {options.micro_batch} x {options.sequence_length} "
        f"on {result['device']}: "
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['model_tflops_per_s']:.2f} model TFLOP/s, "
        f"MFU {'unknown' if mfu is None else f'{mfu:.1%} of the bf16 peak'}, "
        f"peak memory {'not measured' if peak_memory is None else f'{peak_memory:.1f} GiB'}"
    )
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
