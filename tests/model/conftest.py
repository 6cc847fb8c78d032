from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Models this small lose more to threads waiting for each other than they gain."""
    torch.set_num_threads(1)
