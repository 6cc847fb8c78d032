"""A rank that hangs is named, and ended: every rank notes its progress, and a thread beside it reads the notes."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from danube_ray.artifacts import ArtifactError, read_json, write_json
from danube_ray.train.faults import Events

logger = logging.getLogger(__name__)

EXIT_HANGING = 70
NOTES_A_TIMEOUT = 8  # how often a rank's note is renewed within the timeout
STALE_NOTES = 3  # so many missed notes, and the process itself has stopped


class Watchdog:
    """Watches this rank from a thread, and ends its process once it has made no progress for `timeout_s`.

    Ranks meet in collectives, so one that hangs holds up all. Every rank makes the same sequence of `beat`s and notes
    its last under `run_folder/progress`: the rank with the fewest is the one the others wait for. It is named in the
    log and in the run's events; the stack of every thread goes to `run_folder/hang-rank-N.txt`. Ray Train or torchrun
    then starts the workers anew, from the last checkpoint.
    """

    def __init__(self, run_folder: Path, rank: int, world_size: int, timeout_s: float) -> None:
        self.run_folder, self.rank, self.world_size, self.timeout_s = run_folder, rank, world_size, timeout_s
        self.beats, self.step, self.phase = 0, 0, "starting"
        self._beaten = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._note_file(self.rank).unlink(missing_ok=True)

    def beat(self, step: int, phase: str) -> None:
        """This rank begins `phase` of 0-based `step`."""
        self.step, self.phase, self._beaten = step, phase, time.monotonic()
        self.beats += 1

    def _watch(self) -> None:
        while not self._ended.wait(self.timeout_s / NOTES_A_TIMEOUT):
            with suppress(OSError):  # a full disk is no reason to stop watching
                self._note()
            if time.monotonic() - self._beaten > self.timeout_s:
                try:
                    self._tell()
                finally:
                    os._exit(EXIT_HANGING)  # the main thread may sit in a collective that nothing else can end

    def _note_file(self, rank: int) -> Path:
        return self.run_folder / "progress" / f"rank-{rank}.json"

    def _note(self) -> None:
        note = {
            "beats": self.beats, "step": self.step, "phase": self.phase, "noted": time.time(),
            "host": socket.gethostname(), "pid": os.getpid(),
        }  # fmt: skip
        write_json(self._note_file(self.rank), note)

    def _tell(self) -> None:
        notes = self._notes()
        fresh = [rank for rank, note in notes.items() if note["noted"] > time.time() - self._stale_s()]
        detail = self._describe(notes)
        logger.error("no progress for %.0f s: %s", self.timeout_s, detail)
        if self.rank == min(fresh, default=self.rank):  # one of those who can still write
            Events(self.run_folder).write("hang", self.step + 1, detail)
        with (self.run_folder / f"hang-rank-{self.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _stale_s(self) -> float:
        return STALE_NOTES * self.timeout_s / NOTES_A_TIMEOUT

    def _notes(self) -> dict[int, dict[str, Any]]:
        notes = {}
        for rank in range(self.world_size):
            try:
                notes[rank] = read_json(self._note_file(rank))
            except (ArtifactError, OSError):  # gone already, or never come
                continue
        return notes

    def _describe(self, notes: dict[int, dict[str, Any]]) -> str:
        """Name the ranks that the others wait for."""
        fewest = min((note["beats"] for note in notes.values()), default=0)
        named = []
        for rank, note in notes.items():
            if note["beats"] == fewest:
                silent = time.time() - note["noted"] > self._stale_s()
                state = "when last heard of: its process has stopped" if silent else f"in {note['phase']}"
                named.append(f"rank {rank} ({note['host']}, pid {note['pid']}) at step {note['step'] + 1}, {state}")
        missing = sorted(set(range(self.world_size)) - notes.keys())
        named += [f"rank {rank} has left no note" for rank in missing]
        return "; ".join(named)
