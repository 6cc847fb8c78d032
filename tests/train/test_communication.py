"""The wait for other ranks' gradients, in two processes of one gloo group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from danube_ray.train.communication import GradientWait

# Rank 1 begins step 2 a second after rank 0 has computed its gradients. A step's own computation is slow in
# step 3, on both. DDP's logger measures the same on CPUs, and tells it one step later.
RANK = """
import json, sys, threading
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from danube_ray.train.communication import GradientWait

class Bottom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if step == 2 and rank == 0:
            store.set("computed", "yes")
        if step == 3:
            threading.Event().wait(1.0)
        return grad

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = DistributedDataParallel(nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), gradient_as_bucket_view=True)
model._set_ddp_runtime_logging_sample_rate(1)
waiting, waited, known = GradientWait(torch.device("cpu")), [], []
for step in range(5):
    loss = model(Bottom.apply(torch.ones(4, 64, requires_grad=True))).sum()
    told = model._get_ddp_logging_data()
    known.append((told.get("backward_comm_time", 0) - told.get("backward_compute_comm_overlap_time", 0)) / 1e9)
    if step == 2 and rank == 1:
        store.wait(["computed"])
        threading.Event().wait(1.0)
    waiting.backward(loss)
    waited.append(waiting.take_s())
(folder / f"{rank}.json").write_text(json.dumps({"waited": waited, "known": known}))
dist.destroy_process_group()
"""


def test_a_rank_knows_how_long_it_waited_for_the_other(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", RANK, str(tmp_path), str(rank)] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for rank in ranks:
            _, error = rank.communicate()
            assert rank.returncode == 0, error[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
    early, late = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert early["waited"][2] > 0.9
    for rank in (early, late):  # computation is no wait to DDP's logger either, and a busy machine's pauses are in both
        assert rank["waited"][1:4] == pytest.approx(rank["known"][2:5], abs=0.3)


def test_gradients_and_the_wait_of_one_process() -> None:
    """Nothing to wait for: the gradients are those of a plain backward pass."""
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    waiting = GradientWait(torch.device("cpu"))
    waiting.backward((weight**2).sum())
    assert weight.grad is not None and weight.grad.tolist() == [4.0, 6.0]
    assert waiting.take_s() >= 0
    assert waiting.take_s() == 0


@pytest.mark.gpu
def test_on_a_gpu_the_wait_is_measured_in_its_stream() -> None:
    """A GPU's wait: work that the pass's last callback puts into the stream, as DDP puts its wait for NCCL there."""
    from torch.autograd import Variable

    device = torch.device("cuda")
    waiting = GradientWait(device)
    weight = torch.ones(2048, 2048, device=device, requires_grad=True)

    def wait() -> None:
        torch.cuda._sleep(600_000_000)  # clock cycles: over a fifth of a second up to 2.9 GHz

    def queue_at_the_end(grad: torch.Tensor) -> None:
        Variable._execution_engine.queue_callback(wait)

    hook = weight.register_hook(queue_at_the_end)
    for _ in range(2):
        waiting.backward((weight @ weight).sum())
    torch.cuda.synchronize()
    assert waiting.take_s() > 0.2
    hook.remove()
    waiting.backward((weight @ weight).sum())
    torch.cuda.synchronize()
    assert waiting.take_s() < 0.1
