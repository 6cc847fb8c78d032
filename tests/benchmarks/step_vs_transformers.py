"""Our training step against transformers' Llama in a plain torch loop: nano in fp32 on two threads, in turn.

Both start with the same weights and train on the same micro-batches with fused AdamW and clipping. `plain` is the same
work on both sides, causal attention alone; `packed` keeps our attention within documents, as pretraining does, while
transformers goes on with plain causal order.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from danube_ray.config import RunConfig
from danube_ray.train.pretrain import PretrainTask
from danube_ray.train.protocol import TensorBatch
from tests.benchmarks.gpu.ours import Ours
from tests.benchmarks.gpu.peer import Peer
from tests.benchmarks.gpu.workload import Contestant, batches
from tests.benchmarks.nano import nano_run, write_noise
from tests.benchmarks.pairs import compare, record

THREADS, STEPS, WARMUP_TURNS = 2, 2, 3


class OneDocument(PretrainTask):
    """Pretraining that doesn't look where documents begin, as the plain loop."""

    def labels(self, batch: TensorBatch) -> torch.Tensor:
        return batch["tokens"][:, 1:].long()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        return model(batch["tokens"][:, :-1].long(), labels=self.labels(batch))


def plain(run: RunConfig) -> Ours:
    ours = Ours(run, torch.device("cpu"))
    ours.task = OneDocument(run)
    return ours


def speed_of(contestant: Contestant) -> Callable[[], float]:
    """What trains `STEPS` more steps and tells tokens/s."""
    steps = cycle(batches(contestant.run))

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            contestant.train(next(steps))
        return STEPS * contestant.run.global_batch_tokens / (time.perf_counter() - began)

    return measure


def main(pairs: int = 40) -> None:
    torch.set_num_threads(THREADS)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_noise(Path(folder) / "tokens")
        run = nano_run(tokens, Path(folder), "nano", 10_000, THREADS)
        check_same_start(run)
        for name, build in (("plain", plain), ("packed", lambda run: Ours(run, torch.device("cpu")))):
            ours, theirs = speed_of(build(run)), speed_of(Peer(run, torch.device("cpu"), "sdpa", compiled=False))
            for _ in range(WARMUP_TURNS):
                ours(), theirs()
            ratio, figures = compare(ours, theirs, pairs)
            speeds = [statistics.median(column) for column in zip(*figures, strict=True)]
            print(f"{name}: our step / transformers': {ratio}  (aim: at least 1.2)")
            print(f"{name}: {speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s on {THREADS} threads")
            result[name] = {"ratio": ratio, "tokens_per_s": figures}
    record("step_vs_transformers", {name: {**found} for name, found in result.items()})


def check_same_start(run: RunConfig) -> None:
    """The same work: a first step of equal loss and gradient norm."""
    batch = next(batches(run))
    ours = plain(run).train(batch)
    theirs = Peer(run, torch.device("cpu"), "sdpa", compiled=False).train(batch)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor([float(x) for x in theirs]), rtol=1e-4, atol=0)


if __name__ == "__main__":
    main()
