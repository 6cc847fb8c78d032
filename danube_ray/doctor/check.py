"""One finding of the doctor's, and how a check that fails becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """`ok` is None where something is missing that only some verbs need."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def attempt(name: str, check: Callable[[], Check | list[Check]]) -> list[Check]:
    """What `check` finds; where it raises, that is the finding: a machine in any state gets a full report."""
    try:
        found = check()
    except Exception as error:
        return [Check(name, False, f"could not be examined: {type(error).__name__}: {error}")]
    return found if isinstance(found, list) else [found]
