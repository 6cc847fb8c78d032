"""What a CPU's process keeps of freed memory, told by its resident size after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

TENSOR_BYTES, NUM_TENSORS = 28 * 2**20, 12
RESIDENT = f"""
import sys
import psutil, torch
from danube_ray.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = psutil.Process().memory_info().rss
tensors = [torch.ones({TENSOR_BYTES // 4}) for _ in range({NUM_TENSORS})]
del tensors
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is set")
def test_freed_memory_is_kept_for_the_next_step():
    resident_bytes = {}
    for how in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", RESIDENT, how], capture_output=True, text=True, check=True)
        resident_bytes[how] = int(done.stdout)
    assert resident_bytes["keep"] > 0.9 * NUM_TENSORS * TENSOR_BYTES
    assert resident_bytes["plain"] < 0.1 * NUM_TENSORS * TENSOR_BYTES
