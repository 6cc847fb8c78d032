"""The doctor on this machine, and on machines where something is missing or broken."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from danube_ray import doctor
from danube_ray.doctor import gain as fp8
from danube_ray.doctor import gpu, machine, packages
from danube_ray.doctor.check import GIB, Check
from danube_ray.presets import PRESETS, danube_1_8b, nano


@pytest.fixture
def broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package `shattered` 1.2 whose module is the given source, here and in child processes."""

    def install(source: str) -> None:
        (tmp_path / "shattered.py").write_text(source)
        folder = tmp_path / "shattered-1.2.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: shattered\nVersion: 1.2\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """Leaves out loading each package in a process of its own, which takes many seconds."""
    monkeypatch.setattr(packages, "load_errors", lambda modules: {})


@pytest.mark.usefixtures("quick")
def test_every_line_is_true_of_this_machine(tmp_path: Path):
    checks = {check.name: check for check in doctor.examine(nano(), tmp_path)}
    assert {"GPU", "driver", "FP8", "transformer-engine", "deepspeed", "disk speed", "port 8265"} <= checks.keys()
    assert checks["python"] == Check("python", True, ".".join(map(str, sys.version_info[:3])))
    assert checks["packages"].ok and f"torch {importlib.metadata.version('torch')}" in checks["packages"].found
    assert (checks["GPU"].ok is True) == torch.cuda.is_available()
    assert checks["attention"].ok and "sdpa" in checks["attention"].found
    assert checks["collectives"].ok and "gloo" in checks["collectives"].found
    for check in checks.values():
        assert check.found and "could not be examined" not in check.found, check
        assert check.ok or check.remedy, check
    assert not list(tmp_path.iterdir())  # the disk was tried, and left as it was


@pytest.mark.usefixtures("quick")
def test_a_check_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def broken() -> Check:
        raise OSError("no such device")

    monkeypatch.setattr(gpu, "collectives", broken)
    checks = {check.name: check for check in doctor.examine(nano(), tmp_path / "nowhere")}
    assert checks["collectives"].found == "could not be examined: OSError: no such device"
    assert checks["collectives"].ok is checks["disk"].ok is checks["disk speed"].ok is False
    assert checks["memory"].found  # the others are examined all the same


def test_a_port_in_use_is_told_from_a_free_one():
    for address in ("", "127.0.0.1"):
        with socket.socket() as server:
            server.bind((address, 0))
            server.listen()
            number = server.getsockname()[1]
            taken = machine.port(number)
            assert (taken.ok, taken.found) == (None, "in use (Address already in use)")
            assert "choose another port" in taken.remedy
        assert machine.port(number).ok


def test_shared_memory_may_be_missing_or_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing = machine.shared_memory(tmp_path / "shm")
    assert missing.ok is None and "Ray falls back" in missing.remedy
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20, total=8 * GIB))
    full = machine.shared_memory(tmp_path)
    assert full.ok is False and full.found == "0.1 GiB free" and "--shm-size" in full.remedy


def test_a_disk_too_slow_for_the_checkpoints_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = iter((0.0, 2.0, 0.0, 0.5))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    run = danube_1_8b()  # 12 bytes a parameter: 21.97 GB
    slow = machine.write_speed(tmp_path, run, num_bytes=2**20)
    assert slow.ok is None and "checkpoint_every_steps" in slow.remedy
    assert slow.found == "1 MB/s: a checkpoint of danube_1_8b (22.0 GB) takes 41,912.9 s beside the training"
    assert machine.write_speed(tmp_path, nano(), num_bytes=2**20).ok
    assert not list(tmp_path.iterdir())


def test_what_is_wanted_is_pyprojects_in_a_checkout_and_the_installations_elsewhere(tmp_path: Path):
    here, elsewhere = packages.wanted(), packages.wanted(tmp_path)
    assert here.source == "pyproject.toml" and elsewhere.source == "the installed danube-ray"
    for project in (here, elsewhere):
        names = {requirement.name for requirement in project.needed}
        assert {"torch", "ray", "transformers"} <= names and "pytest" not in names
        assert {"deepspeed", "transformer-engine"} <= project.extras.keys()
        assert "3.9.1" not in project.python
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'another'\n")
    assert packages.wanted(tmp_path).source == elsewhere.source


def test_packages_that_are_missing_old_or_broken_are_named(broken_package):
    broken_package("raise OSError('libcuda.so: undefined symbol')")
    wanted = ("torch>=1", "no-such-package>=2", "numpy<1", "shattered>=1")
    project = packages.Wanted("a test", SpecifierSet("<3"), tuple(map(Requirement, wanted)), {})
    errors = packages.load_errors({"shattered": "shattered"})
    checks = [packages.version_check(requirement, errors) for requirement in project.needed]
    assert [check.ok for check in checks] == [True, False, False, False]
    _, missing, old, broken = checks
    assert (missing.found, missing.remedy) == ("not installed", "pip install 'no-such-package>=2'")
    assert old.found.endswith(", not <1")
    assert broken.found == "1.2, but does not load: OSError: libcuda.so: undefined symbol"
    assert packages.python(project).remedy == "install Python <3"


@pytest.mark.slow
def test_every_package_that_is_installed_here_loads():
    project = packages.wanted()
    summary, *wrong = packages.needed_packages(project)
    assert summary.ok and not wrong
    assert all(check.ok or check.found == "not installed" for check in packages.optional_packages(project))


def test_a_package_that_kills_the_process_is_a_finding(broken_package):
    broken_package("import os\nos.kill(os.getpid(), 11)")
    assert packages.load_error("shattered") == "it ended the process with signal 11"
    broken_package("import json")
    assert packages.load_error("shattered") is None


@pytest.mark.parametrize(
    ("version", "vendor", "ok", "found"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC 12.2.0",
            "",
            True,
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23", "0x10de", True, "570.86.15"),
        ("", "0x10de", False, "1 NVIDIA GPU, but no driver"),
        ("", "0x8086", None, "no NVIDIA GPU in this machine"),
        ("", "", None, "no NVIDIA GPU in this machine"),
    ],
)
def test_the_driver_is_read_from_the_kernel(tmp_path: Path, version: str, vendor: str, ok: bool | None, found: str):
    if version:
        (tmp_path / "driver/nvidia").mkdir(parents=True)
        (tmp_path / "driver/nvidia/version").write_text(version)
    if vendor:
        device = tmp_path / "bus/pci/devices/0000:01:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text("0x030200\n")
    check = gpu.driver(proc=tmp_path, sys=tmp_path, smi=str(tmp_path / "no-tool"))
    assert (check.ok, check.found) == (ok, found)
    assert check.ok or check.remedy


def test_the_driver_is_read_from_its_tool_where_the_kernel_hides_it(tmp_path: Path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    tool.chmod(0o755)
    assert gpu.driver(proc=tmp_path, sys=tmp_path, smi=str(tool)) == Check("driver", True, "580.65.06")
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed >&2\nexit 9\n")
    assert gpu.driver(proc=tmp_path, sys=tmp_path, smi=str(tool)).ok is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="for torch's CPU build")
def test_a_torch_without_cuda_beside_a_driver_is_a_fault():
    assert gpu.device(Check("driver", True, "580.65.06")).ok is False
    assert gpu.device(Check("driver", None, "none")).ok is None


def test_the_linears_measured_are_those_that_fp8_computes():
    for preset in PRESETS.values():
        model = preset().model
        shapes = fp8.shapes(model).values()
        assert sum(inputs * outputs for inputs, outputs in shapes) == model.num_layer_linear_parameters


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_a_quantized_tensor_uses_its_formats_range(dtype: torch.dtype):
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    rows, columns, scale = fp8.quantize_both_ways(x, dtype)
    assert rows.float().abs().max() == torch.finfo(dtype).max
    assert torch.equal(columns, rows.t()) and columns.is_contiguous()
    error = (rows.float() * scale - x).norm() / x.norm()
    assert 0.001 < error < (0.03 if dtype == fp8.E4M3 else 0.06)  # 3 and 2 digits of mantissa
    zeros, _ = fp8.quantize(torch.zeros(4, 4), dtype)
    assert not zeros.float().any()


def test_the_fp8_product_is_the_product():
    a, b = torch.randn(32, 64).bfloat16(), torch.randn(64, 48).bfloat16()
    exact = a.float() @ b.float()
    for a_dtype in (fp8.E4M3, fp8.E5M2):
        found = fp8.fp8_product(a, b, a_dtype, fp8.E4M3, fast=False)()
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() / exact.norm() < 0.08


def test_every_linear_is_timed_on_a_cpu_too():
    gain = fp8.measure(nano().model, tokens=32, device=torch.device("cpu"), repeats=1)
    assert [linear.name for linear in gain.linears] == ["qkv", "o", "gate-up", "down"]
    for linear in gain.linears:
        assert [product.name for product in linear.products] == ["forward", "input gradient", "weight gradient"]
        assert linear.bf16_s > 0 and linear.cast_s > 0
    assert gain.device == "cpu" and gain.verdict


def linear(name: str, bf16_s: float, fp8_s: float, cast_s: float, te_s: float | None = None) -> fp8.Linear:
    return fp8.Linear(name, 1, 1, (fp8.Product("forward", bf16_s, fp8_s),), cast_s, te_s)


def test_fp8_pays_where_the_casts_leave_a_gain():
    wide, narrow = linear("wide", 3.0, 1.0, 0.5), linear("narrow", 1.0, 0.8, 0.7)
    assert wide.pays and not narrow.pays
    both = fp8.Gain("a GPU", 1, "", (wide, narrow))
    assert both.layer == pytest.approx(4 / 3)
    assert both.verdict == "FP8 pays: 1.33 times as fast over a layer's linears, but not in narrow"
    assert "use precision bf16" in fp8.Gain("a GPU", 1, "", (narrow,)).verdict
    assert linear("narrow", 1.0, 0.8, 0.7, te_s=0.9).pays  # transformer-engine's casts are faster


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_gain_is_one_line_and_no_fault():
    finding, gain = doctor.fp8_gain(danube_1_8b())
    assert (finding.ok, finding.found, gain) == (None, "not measured: no GPU with FP8 here", None)


@pytest.mark.gpu
def test_on_a_gpu_the_lines_are_true_and_fp8_gains_on_wide_products(tmp_path: Path):
    checks = {check.name: check for check in doctor.examine(danube_1_8b(), tmp_path)}
    assert checks["GPU"].ok and torch.cuda.get_device_name() in checks["GPU"].found
    assert checks["driver"].ok and checks["collectives"].ok and "NCCL" in checks["collectives"].found
    finding, gain = doctor.fp8_gain(danube_1_8b())
    if torch.cuda.get_device_capability() < (9, 0):
        assert gain is None
        return
    assert gain is not None, finding
    by_name = {linear.name: linear for linear in gain.linears}
    forward = by_name["gate-up"].products[0]
    assert 2 * 16_384 * 2_560 * 13_824 / forward.bf16_s < 1.1 * 989e12  # no faster than the GPU's peak: it was timed
    assert forward.gain > 1.2, gain
