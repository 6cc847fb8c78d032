"""What a CPU's process keeps of freed memory, told by the page faults of using it again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
from danube_ray.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for again in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(2**21) for _ in range(40)]  # 320 MB
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is set")
def test_memory_that_is_used_again_is_not_mapped_anew():
    faults = {}
    for how in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < faults["plain"] / 10
