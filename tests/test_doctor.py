"""The doctor on this machine, and on machines where something is missing or broken."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch

from danube_ray import doctor


def test_every_check_reports_and_this_machine_can_run_the_suite(tmp_path: Path):
    checks = {check.name: check for check in doctor.examine(tmp_path)}
    assert {"python", "torch", "GPU", "FP8", "transformer-engine", "memory", "disk", "port 8265"} <= checks.keys()
    for name in ("python", "torch", "attention", "collectives"):
        assert checks[name].ok, checks[name]
    assert checks["torch"].found == torch.__version__
    assert (checks["GPU"].ok is True) == torch.cuda.is_available()
    for check in checks.values():
        assert check.found
        assert check.ok or check.remedy or "could not be examined" in check.found, check


def test_a_check_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def broken() -> doctor.Check:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "gpu", broken)
    found = next(check for check in doctor.examine() if check.name == "GPU")
    assert (found.ok, found.found) == (False, "could not be examined: OSError: no such device")


def test_a_folder_that_is_not_there_is_a_finding(tmp_path: Path):
    found = next(check for check in doctor.examine(tmp_path / "nowhere") if check.name == "disk")
    assert found.ok is False


def test_a_port_in_use_is_told_from_a_free_one():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        number = server.getsockname()[1]
        assert doctor.port(number).ok is None
        assert doctor.port(number).found == "in use"
    assert doctor.port(number).ok


def test_a_package_that_is_installed_but_does_not_import_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "shattered_package.py").write_text("raise OSError('libcuda.so: undefined symbol')")
    metadata = tmp_path / "shattered_package-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shattered-package\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.optional_package("shattered-package", "shattered_package", "FP8")
    assert found.ok is False
    assert "1.2, but importing it fails: libcuda.so: undefined symbol" in found.found
    missing = doctor.optional_package("no-such-package", "no_such_package", "FP8")
    assert missing.ok is None
    assert "pip install" in missing.remedy


def test_versions_and_sizes_out_of_range_name_what_is_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert doctor.python().remedy == "install Python 3.11 or later, below 3.13"
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "2.4.0+cu121")
    assert doctor.torch_version().remedy == "pip install 'torch>=2.11,<2.14'"
    short = doctor.enough("memory", 2**30, 6 * 2**30, "the demo needs that much")
    assert (short.ok, short.remedy) == (False, "at least 6.0 GiB: the demo needs that much")
