"""A rank that hangs is named and ended, whether it waits for ever or its process has stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from danube_ray.artifacts import read_json_lines
from danube_ray.train.faults import EVENTS
from danube_ray.train.watchdog import EXIT_HANGING

RANK = """
import dataclasses, os, signal, sys, threading
from pathlib import Path
from danube_ray.train.context import torchrun_context
from danube_ray.train.loop import fit
from tests.train.counting import OPTIMIZER, SETTINGS, CountingTask

folder, how = Path(sys.argv[1]), sys.argv[2]

class Hangs(CountingTask):
    def enter_step(self, module, step):
        self.step = step

    def loss(self, model, batch):
        if self.step == 3 and os.environ["RANK"] == "1":
            if how == "stops":
                (folder / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()
        return super().loss(model, batch)

with torchrun_context() as context:
    fit(Hangs(), folder, dataclasses.replace(SETTINGS, hang_timeout_s=4.0), OPTIMIZER, context)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param("waits", "in forward of micro-batch 1", marks=pytest.mark.slow),
        ("stops", "its process has stopped"),
    ],
)
def test_the_rank_that_hangs_is_named_and_the_others_do_not_wait_for_ever(tmp_path: Path, how: str, said: str):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    processes = []
    for rank in (0, 1):
        environment = {
            **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "RANK": str(rank),
            "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(tmp_path)),
        }  # fmt: skip
        command = [sys.executable, str(script), str(tmp_path), how]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        error = processes[0].communicate(timeout=120)[1]
        assert processes[0].returncode == EXIT_HANGING, error[-2000:]
        if how == "waits":
            processes[1].communicate(timeout=60)
            assert processes[1].returncode == EXIT_HANGING
        else:
            assert psutil.Process(processes[1].pid).status() == psutil.STATUS_STOPPED
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    hangs = [row for row in read_json_lines(tmp_path / EVENTS) if row["event"] == "hang"]
    assert [row["step"] for row in hangs] == [4]  # one rank tells it
    assert "rank 1 (" in hangs[0]["detail"] and said in hangs[0]["detail"]
    assert "rank 0" not in hangs[0]["detail"]
    assert "no progress for 4 s: rank 1" in error
    assert "accumulate" in (tmp_path / "hang-rank-0.txt").read_text()  # the stack of the loop's thread


LONE = """
import sys, threading
from pathlib import Path
from danube_ray.train.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), rank=0, world_size=1, timeout_s=1.0) as watchdog:
    watchdog._note_file(0).unlink()
    watchdog._note_file(0).parent.rmdir()
    watchdog._note_file(0).parent.write_text("no folder any more")
    threading.Event().wait()
"""


def test_a_rank_that_hangs_where_nothing_can_be_written_is_ended_too(tmp_path: Path):
    ended = subprocess.run([sys.executable, "-c", LONE, str(tmp_path)], stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == EXIT_HANGING, ended.stderr[-2000:]


def free_port(folder: Path) -> int:
    """One port for both ranks: chosen once, kept in a file."""
    import socket

    file = folder / "port"
    if not file.is_file():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            file.write_text(str(probe.getsockname()[1]))
    return int(file.read_text())
