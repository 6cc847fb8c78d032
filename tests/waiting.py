"""Waiting on conditions, not on clocks."""

from __future__ import annotations

import threading
from collections.abc import Callable

POLL_S = 0.01


def wait_for(condition: Callable[[], object]) -> None:
    """Return when `condition` holds; the test's own time limit ends a wait that is in vain."""
    pause = threading.Event()
    while not condition():
        pause.wait(POLL_S)
