"""Checkpoints: safetensors and JSON, committed by a manifest of hashes that is written last. No pickle.

A folder `step-00000050` holds `model.safetensors` (the trainable weights in float32, which are the master weights),
`optimizer-00000.safetensors` (AdamW's moments, keyed by parameter name, so that they fit any number of workers) and
`state.json`. A folder without its manifest, or with a file that the manifest doesn't describe, was never committed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from danube_ray.artifacts import ArtifactError, commit, damage, read_json, write_json

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer-00000.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder, committed or not, oldest first."""
    names = [path.name for path in checkpoints.glob("step-*")] if checkpoints.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8})", name)))


def newest_verified(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every file matches its manifest. What the stream and the workers both start from."""
    for step in reversed(checkpoint_steps(checkpoints)):
        folder = checkpoint_folder(checkpoints, step)
        if damage(folder) is None:
            return folder
    return None


def step_of(checkpoint: Path | None) -> int:
    """Steps done at a checkpoint; 0 without one."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters by name, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in module.named_parameters() if p.requires_grad}


def save(checkpoints: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write and commit the checkpoint of `state["step"]`. One rank calls it: all hold the same."""
    folder = checkpoint_folder(checkpoints, state["step"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(trainable_state(module), folder / MODEL)
    moments = {
        f"{name}.{moment}": optimizer.state[parameter][moment].cpu().contiguous()
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }
    save_file(moments, folder / OPTIMIZER)
    write_json(folder / STATE, state)
    commit(folder)
    return folder


def restore(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, data_hash: str) -> dict[str, Any]:
    """Load weights and moments in place and return the state.

    Raises `ArtifactError` when the checkpoint's data order is not `data_hash` or its parameters are not the module's.
    """
    state = read_json(folder / STATE)
    if state["data_hash"] != data_hash:
        raise ArtifactError(
            f"{folder} saw other data, or in another order (hash {state['data_hash'][:12]}, now {data_hash[:12]}): "
            "give this run another name, or remove that folder"
        )
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    weights, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    if weights.keys() != parameters.keys():
        different = sorted(weights.keys() ^ parameters.keys())[:3]
        raise ArtifactError(f"{folder} holds other parameters than the model, such as {', '.join(different)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"]), dtype=torch.float32, device=parameter.device),
                **{moment: moments[f"{name}.{moment}"].to(parameter.device) for moment in MOMENTS},
            }
    return state


def keep_newest(checkpoints: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for step in checkpoint_steps(checkpoints)[:-count]:
        shutil.rmtree(checkpoint_folder(checkpoints, step), ignore_errors=True)
