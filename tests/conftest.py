"""Fixtures for the whole suite: the shared test data, and the one Ray cluster that every Ray test uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# One thread a process: on a busy machine, threads that wait for each other make tiny tensors many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REPOSITORY = Path(__file__).parent.parent


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
