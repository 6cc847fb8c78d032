"""Which backend attends: the one that is named, or the first that can where the choice is left to us."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import get_args

import torch

from danube_ray.config import AttentionBackend, ConfigError, require
from danube_ray.model.attention.machine import Machine, Need, refusal

log = logging.getLogger(__name__)

BACKENDS: tuple[AttentionBackend, ...] = tuple(name for name in get_args(AttentionBackend) if name != "auto")


@dataclass(frozen=True)
class Choice:
    """A backend and why it is the one, in words for a log."""

    name: AttentionBackend
    reason: str


def choose(name: AttentionBackend, need: Need, machine: Machine) -> Choice:
    """The backend called `name`, or for `auto` the first preferred one that can. A function of its arguments alone.

    Raises `ConfigError` where the named one can't do what is needed on this machine.
    """
    if name != "auto":
        require(name in BACKENDS, "attention", name, f"auto, {', '.join(BACKENDS)}")
        refused = refusal(name, need, machine)
        if refused:
            raise ConfigError("attention", f"{name} on {machine.name}", refused.allowed, refused.remedy)
        return Choice(name, "as set")
    order, why = preference(need, machine)
    reasons = [f"{why}, on {machine.name}"]
    for candidate in order:
        refused = refusal(candidate, need, machine)
        if not refused:
            return Choice(candidate, "; ".join(reasons))
        reasons.append(f"{candidate} needs {refused.allowed}")
    raise AssertionError("sdpa, the last, refuses nothing")


def preference(need: Need, machine: Machine) -> tuple[tuple[AttentionBackend, ...], str]:
    """The backends in the order in which `auto` asks them, sdpa last, and the reason for the order.

    By what is known of the kernels, not measured here: flash and varlen (the same kernels on torch 2.11 to 2.13) before
    cuDNN's, whose plans are made for so many sequences.
    """
    if not machine.has_cuda:
        return ("sdpa",), "the only one that trains"
    if need.dtype == torch.float32:
        return ("sdpa",), "the others compute in 16 bits"
    if not need.masked:
        return ("sdpa",), "nothing but causal order, where torch takes the GPU's fastest kernel"
    return ("flash", "varlen", "te", "flex", "sdpa"), "passes over what a window or documents hide"


@cache
def announce(choice: Choice) -> None:
    """Log a choice, the first time that it is made."""
    log.info("attention: %s (%s)", choice.name, choice.reason)
