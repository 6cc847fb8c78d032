"""The one-GPU benchmark, on the CPU at nano size: it trains, counts rightly, and says what it can't do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from danube_ray.config import ModelConfig
from danube_ray.model.transformer import Transformer
from danube_ray.presets import nano
from tests.benchmarks import gpu_step

NANO = ["--preset", "nano", "--device", "cpu", "--sequence-length", "64", "--micro-batch", "2", "--warmup-steps", "1"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tensors this small only make threads wait for each other


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_timed_and_its_figures_agree(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "result.json"
    more = ["--steps", "4", "--precision", precision, "--accumulate", "2", "--packed", "--peak-tflops", "0.5"]
    gpu_step.main([*NANO, *more, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["tokens_per_s"] == pytest.approx(2 * 64 * 2 / result["step_s"]["median"])
    flops = nano().model.flops_per_token(64)
    assert result["mfu_of_bf16_peak"] == pytest.approx(result["tokens_per_s"] * flops / 0.5e12)
    assert result["loss_after"] < result["loss_before"]  # the same batch again and again: it must learn it
    assert result["settings"]["precision"] == precision
    assert result["provenance"]["versions"]["torch"]
    assert "tokens/s" in capsys.readouterr().out


def test_a_chunked_loss_has_the_same_gradients():
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        context_length=32,
    )
    torch.manual_seed(0)
    model, tokens = Transformer(config), torch.randint(0, 50, (2, 12))
    results = []
    for chunk_tokens in (0, 5):
        model.zero_grad()
        loss = gpu_step.chunked_loss(model.lm_head, model.model(tokens[:, :-1]), tokens[:, 1:], chunk_tokens)
        loss.backward()
        results.append(
            (loss.detach(), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
        )
    torch.testing.assert_close(results[0], results[1])


def test_fp8_without_a_gpu_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        gpu_step.main([*NANO, "--precision", "fp8-te"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("precision is 'fp8-te on cpu', allowed is a GPU of Hopper or later")
    assert len(error.splitlines()) == 1


def test_it_needs_neither_ray_nor_tyro(tmp_path: Path):
    """Run as a GPU machine runs it: from elsewhere, by path, in an interpreter that refuses both packages."""
    script = Path(gpu_step.__file__)
    code = (
        "import runpy, sys\n"
        "sys.modules['ray'] = sys.modules['tyro'] = None\n"
        f"sys.argv = ['gpu_step.py', *{NANO!r}, '--steps', '1']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nano bf16 2 x 64 on cpu" in done.stdout
