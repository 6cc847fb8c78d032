"""Fixtures for the whole suite: the shared test data, and the one Ray cluster that every Ray test uses."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# One thread a process: on a busy machine, threads that wait for each other make tiny tensors many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it sends, and writes to the home folder, once imported
# A shell's background jobs ignore Ctrl+C, and so would every program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

REPOSITORY = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In one of several processes (`make test`): a single one runs all that uses the Ray cluster, and those tests begin
    first, as they take longest; the others run folder by folder, so that what a folder's tests share is made once."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("ray") is None)
        for item in items:
            folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
            item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else folder))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout (`DANUBE_TEST_DATA`, or `../shared/data`)."""
    folder = Path(os.environ.get("DANUBE_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the test data in {folder} (DANUBE_TEST_DATA names another folder)")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local cluster for the suite, on ports of its own; never one that happens to run on this machine."""
    from danube_ray.runtime.session import session

    os.environ.pop("RAY_ADDRESS", None)
    with session(num_cpus=4):
        yield
