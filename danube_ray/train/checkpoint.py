"""Checkpoints: safetensors and JSON, committed by a manifest of hashes that is written last. No pickle.

A folder `step-00000050` holds `model.safetensors` (the trainable weights in float32, which are the master weights),
`optimizer-00000.safetensors` (AdamW's moments, keyed by parameter name, so that they fit any strategy and number of
workers), `fp8.safetensors` (FP8's scales, where delayed scaling keeps any) and `state.json`. A folder without its
manifest, or with a file that the manifest doesn't describe, was never committed.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from danube_ray.artifacts import MANIFEST, ArtifactError, commit, damage, first_difference, read_json, write_json

MODEL, OPTIMIZER, FP8, STATE = "model.safetensors", "optimizer-00000.safetensors", "fp8.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: weights by name, moments as `NAME.exp_avg` and `NAME.exp_avg_sq`, FP8 scales, and state.

    `state` has at least `step` (steps done), `updates` (steps that changed the weights) and `identity` (`Task`).
    """

    weights: Tensors
    moments: Tensors
    scales: Tensors
    state: dict[str, Any]


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder, committed or not, oldest first."""
    names = [path.name for path in checkpoints.glob("step-*")] if checkpoints.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8})", name)))


def newest_verified(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every file matches its manifest. What the stream and the workers both start from."""
    return verified(checkpoints)[0]


def verified(checkpoints: Path) -> tuple[Path | None, dict[int, str]]:
    """The newest verified checkpoint, and by step what is wrong with the newer ones that were passed over."""
    passed_over: dict[int, str] = {}
    for step in reversed(checkpoint_steps(checkpoints)):
        folder = checkpoint_folder(checkpoints, step)
        wrong = damage(folder)
        if wrong is None:
            return folder, passed_over
        passed_over[step] = wrong
    return None, passed_over


def newest_committed(checkpoints: Path) -> Path | None:
    """The newest checkpoint with a manifest and a readable state: for what that says, not to start from."""
    for step in reversed(checkpoint_steps(checkpoints)):
        folder = checkpoint_folder(checkpoints, step)
        with suppress(ArtifactError):
            if (folder / MANIFEST).is_file() and read_json(folder / STATE):
                return folder
    return None


def step_of(checkpoint: Path | None) -> int:
    """Steps done at a checkpoint; 0 without one."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def write(checkpoints: Path, snapshot: Snapshot) -> Path:
    """Write and commit the checkpoint of `snapshot.state["step"]`. One rank calls it."""
    folder = checkpoint_folder(checkpoints, snapshot.state["step"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(snapshot.weights, folder / MODEL)
    save_file(snapshot.moments, folder / OPTIMIZER)
    if snapshot.scales:
        save_file(snapshot.scales, folder / FP8)
    write_json(folder / STATE, snapshot.state)
    commit(folder)
    return folder


def read(folder: Path, names: set[str]) -> Snapshot:
    """The checkpoint in `folder`; `ArtifactError` when its trainable parameters are not those of these `names`."""
    weights, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    if weights.keys() != names:
        different = sorted(weights.keys() ^ names)[:3]
        raise ArtifactError(f"{folder} holds other parameters than the model, such as {', '.join(different)}")
    scales = load_file(folder / FP8) if (folder / FP8).is_file() else {}
    return Snapshot(weights, moments, scales, read_json(folder / STATE))


def require_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raise `ArtifactError` for a checkpoint of another model, plan or tokenizer, with the first field that differs."""
    require_equal(folder, read_json(folder / STATE)["identity"], identity)


def require_equal(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `ArtifactError` where what `folder` was made with is not what is asked for now."""
    difference = first_difference(before, now)
    if difference is not None:
        field, was, is_now = difference
        raise ArtifactError(
            f"{folder} was made with {field} = {was!r}, this run has {is_now!r}: "
            "give this run another name, or remove that folder"
        )


def keep_newest(checkpoints: Path, newest: int, count: int, milestone_every_steps: int = 0) -> None:
    """Keep the `count` newest committed checkpoints up to step `newest`, and those at `milestone_every_steps`.

    What was never committed goes, and what lies past `newest`: the run began anew before it, so it is damaged.
    """
    steps = checkpoint_steps(checkpoints)
    committed = [s for s in steps if s <= newest and (checkpoint_folder(checkpoints, s) / MANIFEST).is_file()]
    milestones = {step for step in committed if milestone_every_steps and step % milestone_every_steps == 0}
    for step in set(steps) - set(committed[-count:]) - milestones:
        shutil.rmtree(checkpoint_folder(checkpoints, step), ignore_errors=True)
