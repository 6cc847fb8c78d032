"""Python and the packages: which versions are there, whether the project allows them, whether they load."""

from __future__ import annotations

import concurrent.futures
import platform
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from danube_ray.doctor.check import Check

PROJECT = "danube-ray"
IMPORT_TIMEOUT_S = 120.0

NAMED = ("ray", "torch", "transformers")  # the rest are counted
# What holds compiled code, and so can be installed and yet not load; and its module.
COMPILED = {
    "torch": "torch",
    "ray": "ray",
    "pyarrow": "pyarrow",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "xllamacpp": "xllamacpp",
}
# What the extras bring for GPUs: the module, which loads once torch has loaded its CUDA libraries, and what it is for.
OPTIONAL = {
    "transformer-engine": ("transformer_engine.pytorch", "FP8 by transformer-engine, and its attention"),
    "torchao": ("torchao.float8", "FP8 by torchao"),
    "flash-attn": ("flash_attn", "the flash attention backend"),
    "deepspeed": ("deepspeed", "ZeRO, for models that outgrow a GPU"),
}


@dataclass(frozen=True)
class Wanted:
    """What the project asks for: Python, the packages it needs, and those of its extras by name."""

    source: str
    python: SpecifierSet
    needed: tuple[Requirement, ...]
    extras: dict[str, Requirement]


def wanted(checkout: Path = Path(__file__).parents[2]) -> Wanted:
    """From pyproject.toml in a checkout, whose installed metadata may be older; else from the installation's."""
    file = checkout / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"] if file.is_file() else {}
    if project.get("name") == PROJECT:
        extras = [text for group in project.get("optional-dependencies", {}).values() for text in group]
        needed, python, source = project["dependencies"], project["requires-python"], "pyproject.toml"
    else:
        listed = metadata.requires(PROJECT) or []
        extras = [text for text in listed if "extra ==" in text]
        needed = [text for text in listed if "extra ==" not in text]
        python, source = metadata.metadata(PROJECT)["Requires-Python"], f"the installed {PROJECT}"
    by_name = {requirement.name: requirement for requirement in map(Requirement, extras)}
    return Wanted(source, SpecifierSet(python), tuple(map(Requirement, needed)), by_name)


def python(project: Wanted) -> Check:
    version = platform.python_version()
    ok = project.python.contains(version, prereleases=True)
    return Check("python", ok, version, "" if ok else f"install Python {project.python}")


def needed_packages(project: Wanted) -> list[Check]:
    """One line for all that are as they should be, and one for each that is not."""
    broken = load_errors({name: module for name, module in COMPILED.items() if installed(name)})
    checks = [version_check(requirement, broken) for requirement in project.needed]
    wrong = [check for check in checks if not check.ok]
    main = ", ".join(f"{check.name} {check.found}" for check in checks if check.ok and check.name in NAMED)
    fine = f"{len(checks) - len(wrong)} of {len(checks)} as {project.source} wants: {main}"
    return [Check("packages", not wrong, fine, "" if not wrong else "see below"), *wrong]


def version_check(requirement: Requirement, broken: dict[str, str]) -> Check:
    name, version = requirement.name, installed(requirement.name)
    install = f"pip install '{name}{requirement.specifier}'"
    if version is None:
        return Check(name, False, "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, False, f"{version}, not {requirement.specifier}", install)
    if name in broken:
        return Check(name, False, f"{version}, but does not load: {broken[name]}", f"reinstall it: {install}")
    return Check(name, True, version)


def optional_packages(project: Wanted) -> list[Check]:
    """The packages of the extras that GPUs want; a missing one only limits what can be chosen."""
    broken = load_errors({name: module for name, (module, _) in OPTIONAL.items() if installed(name)})
    checks = []
    for name, (_, purpose) in OPTIONAL.items():
        if installed(name) is None:
            checks.append(Check(name, None, "not installed", f"for {purpose}: pip install 'danube-ray[gpu]'"))
        else:
            checks.append(version_check(project.extras.get(name, Requirement(name)), broken))
    return checks


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load_errors(modules: dict[str, str]) -> dict[str, str]:
    """Why a package's module does not load, by package. Each is tried in a process of its own: a crash is an answer."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        errors = dict(zip(modules, pool.map(load_error, modules.values()), strict=True))
    return {name: error for name, error in errors.items() if error}


def load_error(module: str) -> str | None:
    needs_torch = any(module == optional for optional, _ in OPTIONAL.values())
    script = f"import torch, {module}" if needs_torch else f"import {module}"
    command = [sys.executable, "-P", "-c", script]  # -P: not what happens to lie in this folder
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"nothing after {IMPORT_TIMEOUT_S:.0f} s"
    if done.returncode < 0:
        return f"it ended the process with signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"exit status {done.returncode}") if done.returncode else None
