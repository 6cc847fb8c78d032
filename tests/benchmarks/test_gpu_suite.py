"""The one-GPU benchmark around its measurements: kernels' families, the machine, the command line, and failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu.cases import BF16, Case, Mode
from tests.benchmarks.gpu.kernels import Kernel, busy_us, family, kernels, own_time, where_time_goes
from tests.benchmarks.gpu.machine import Clocks, machine
from tests.benchmarks.gpu.suite import RESULTS, supervise
from tests.benchmarks.gpu.summary import summary
from tests.benchmarks.gpu.workload import one_gpu_run

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]


def nano_case(mode: Mode) -> Case:
    return Case(kind="speed", preset="nano", sequence_length=128, mode=mode)


class TestKernels:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "GEMM"),
            ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "GEMM"),
            ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1", "GEMM"),
            ("void flash_fwd_kernel<Flash_fwd_kernel_traits<96, cutlass::bfloat16_t>>", "attention"),
            ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
            ("triton_tem_fused_flex_attention_0", "attention"),
            ("triton_poi_fused__flash_attention_forward_transpose_view_3", "elementwise"),
            ("triton_red_fused__to_copy_abs_max_2", "cast"),
            ("triton_per_fused__log_softmax_nll_loss_forward_1", "loss"),
            ("void transformer_engine::(anonymous namespace)::cast_transpose_fused_kernel", "cast"),
            ("void at::native::elementwise_kernel<bfloat16_copy_kernel_cuda>", "cast"),
            ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
            ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>", "loss"),
            ("Memcpy HtoD (Pinned -> Device)", "copies"),
            ("void at::native::vectorized_elementwise_kernel<4, MulFunctor, Broadcast>", "elementwise"),
        ],
    )
    def test_a_kernel_s_name_puts_it_in_its_family(self, name: str, expected: str):
        assert family(name) == expected

    def test_busy_time_counts_kernels_that_run_beside_each_other_once(self):
        found = [Kernel("a", 0, 10), Kernel("b", 5, 10), Kernel("c", 6, 2), Kernel("d", 20, 5)]
        assert busy_us(found) == 20

    def test_rates_and_idle_time_follow_from_the_kernels(self, tmp_path: Path):
        run = one_gpu_run(nano_case(BF16), tmp_path, 4, 1)
        found = [Kernel("some_gemm", 0, 500_000), Kernel("flash_fwd", 500_000, 250_000)]
        result = where_time_goes(found, 1.0, 1_000, run)
        assert result["idle_share"] == pytest.approx(0.25)
        rates = result["gemm_tflops_per_s"] * 0.5 + result["attention_tflops_per_s"] * 0.25
        assert rates * 1e12 == pytest.approx(run.model.flops_per_token(128) * 1_000)

    def test_without_a_gpu_operators_count_without_those_they_call(self, tmp_path: Path):
        nested = [Kernel("outer", 0, 10), Kernel("inner", 2, 5), Kernel("innermost", 3, 1), Kernel("later", 20, 5)]
        assert own_time(nested) == [
            Kernel("outer", 0, 2),
            Kernel("inner", 2, 1),
            Kernel("innermost", 3, 1),
            Kernel("inner", 4, 3),
            Kernel("outer", 7, 3),
            Kernel("later", 20, 5),
        ]
        x = torch.randn(64, 64)
        assert "aten::mm" in {k.name for k in kernels(lambda: torch.nn.functional.linear(x, x), CPU, tmp_path)}


class TestMachine:
    def test_clocks_are_the_medians_of_what_nvidia_smi_says(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        script = tmp_path / "nvidia-smi"
        lines = ["1980, 2619, 500.0, [N/A]", "1755, 2619, 690.5, [N/A]", "1410, 2619, 700.0, [N/A]", "1200, 26"]
        begun = tmp_path / "begun"
        script.write_text(f"#!/bin/sh\nprintf '%s' '{chr(10).join(lines)}'\n: > {begun}\nexec tail -f /dev/null\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with Clocks() as clocks:
            while not begun.exists():
                os.sched_yield()
        assert clocks.medians == {
            "clocks.sm": 1755,
            "clocks.sm least": 1410,
            "clocks.mem": 2619,
            "clocks.mem least": 2619,
            "power.draw": 690.5,
            "power.draw least": 500,
        }

    def test_a_machine_without_nvidia_smi_says_so_by_saying_nothing(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("PATH", "")
        with Clocks() as clocks:
            pass
        assert clocks.medians == {}
        about = machine(CPU)
        assert about["device"] == "cpu" and about["packages"]["torch"] == torch.__version__
        assert about["provenance"]["git_revision"] is None


class TestSupervision:
    """A worker is any command; these die, hang and go on in their own ways."""

    CASES = [nano_case(mode) for mode in (BF16, Mode(eager=True), Mode(attention="sdpa"))]
    FIRST_MISSING = """
import json, os, pathlib, signal, sys
out, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
results = out / "results.jsonl"
done = [json.loads(line)["case"] for line in results.read_text().splitlines()] if results.exists() else []
def write(name):
    with results.open("a") as file:
        file.write(json.dumps({"case": name}) + chr(10))
    (out / "running").unlink(missing_ok=True)
def begin(name):
    (out / "running").write_text(name)
todo = [name for name in names if name not in done]
"""

    def worker(self, out: Path, behaviour: str) -> list[str]:
        names = [case.name for case in self.CASES]
        return [sys.executable, "-c", self.FIRST_MISSING + behaviour, str(out), *names]

    def lines(self, out: Path) -> list[dict]:
        return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]

    def test_a_worker_that_dies_costs_its_case_and_the_next_goes_on(self, tmp_path: Path):
        last = "print('last words', file=sys.stderr, flush=True)"
        dies = f"write(todo[0])\nif len(todo) > 1:\n    begin(todo[1])\n    {last}\n    os.abort()"
        left = supervise(self.CASES, tmp_path, time.time() + 60, self.worker(tmp_path, dies), case_s=60)
        lines = self.lines(tmp_path)
        assert left == []
        assert [line["case"] for line in lines] == [case.name for case in self.CASES]
        assert "error" not in lines[0] and "error" not in lines[2]
        assert lines[1]["error"]["type"] == "WorkerDied"
        assert "code -6" in lines[1]["error"]["message"] and "last words" in lines[1]["error"]["message"]

    def test_a_case_without_an_end_is_ended_and_the_next_goes_on(self, tmp_path: Path):
        hangs = "write(todo[0])\nif len(todo) > 1:\n    begin(todo[1])\n    signal.pause()"
        left = supervise(self.CASES, tmp_path, time.time() + 60, self.worker(tmp_path, hangs), case_s=0.5)
        assert left == []
        assert [line.get("error", {}).get("type") for line in self.lines(tmp_path)] == [None, "WorkerDied", None]
        assert "no end within 0.5 s" in self.lines(tmp_path)[1]["error"]["message"]

    def test_what_the_deadline_cuts_off_is_left_over_not_failed(self, tmp_path: Path):
        hangs = "write(todo[0])\nbegin(todo[1])\nsignal.pause()"
        left = supervise(self.CASES, tmp_path, time.time() + 1, self.worker(tmp_path, hangs), case_s=60)
        assert [line["case"] for line in self.lines(tmp_path)] == [self.CASES[0].name]
        assert left == self.CASES[1:]

    def test_a_worker_that_cannot_start_ends_the_suite(self, tmp_path: Path):
        left = supervise(self.CASES, tmp_path, time.time() + 60, self.worker(tmp_path, "sys.exit(3)"), case_s=60)
        assert left == self.CASES
        assert not (tmp_path / RESULTS).exists()

    def test_a_worker_that_stops_early_is_followed_by_another_until_none_gets_further(self, tmp_path: Path):
        one_each = "if len(todo) > 1:\n    write(todo[0])"
        left = supervise(self.CASES, tmp_path, time.time() + 60, self.worker(tmp_path, one_each), case_s=60)
        assert left == self.CASES[2:]
        assert summary(
            [
                {**line, "kind": "speed", "error": {"type": "A", "message": "b\nc"}, "machine": {}}
                for line in self.lines(tmp_path)
            ],
            [case.name for case in left],
        ).endswith(f"Not measured: {self.CASES[2].name}.\n")


def test_a_worker_begins_no_case_that_may_not_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--preset", "nano", "--device", "cpu", "--out", str(tmp_path)]
    main([*options, "--worker-until", str(time.time() + 10)])
    assert not (tmp_path / RESULTS).exists()
    main([*options, "--budget-seconds", "0", "--only", "nano-128-bf16*"])
    assert "no results" in capsys.readouterr().out
    assert (tmp_path / "summary.md").read_text().strip().endswith("nano-128-bf16-sdpa.")


@pytest.mark.slow
def test_the_whole_suite_runs_from_the_command_line_without_ray_or_tyro(tmp_path: Path):
    for absent in ("ray", "tyro"):
        (tmp_path / f"{absent}.py").write_text(f"raise ImportError('no {absent} here')")
    out = tmp_path / "out"
    names = ["nano-128-bf16-eager", "nano-128-fp8-te-current", "nano-128-bf16-eager-vs-peer"]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--preset", "nano", "--device", "cpu", "--only", *names]
    small = ["--steps", "2", "--pairs", "2", "--micro-batch", "2", "--accumulate", "1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, *small], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {line["case"]: line for line in map(json.loads, (out / RESULTS).read_text().splitlines())}
    assert set(lines) == set(names)
    assert lines["nano-128-fp8-te-current"]["error"]["message"].startswith("precision is 'fp8-te on cpu'")
    assert lines["nano-128-bf16-eager"]["tokens_per_s"]["median"] > 0
    assert lines["nano-128-bf16-eager-vs-peer"]["ratio"]["pairs"] == 2
    assert "| nano-128-bf16-eager |" in done.stdout and "Failed:" in done.stdout
    assert (out / "summary.md").read_text() in done.stdout
    assert all(line["machine"]["packages"]["torch"] == torch.__version__ for line in lines.values())
