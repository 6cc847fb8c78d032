"""Our training step against transformers' Llama in a plain torch loop: nano in fp32 on two threads, in turn.

Both start with the same weights and train on the same micro-batches with fused AdamW and clipping; nothing is
compiled. Each has a process of its own, ours set up as the loop sets it up. Three cases:

    plain     the preset's micro-batch, a step's 4,096 tokens; the same work on both sides, causal attention alone
    halved    the same in two micro-batches a step
    packed    our attention stays within documents, as in pretraining; transformers' goes on in plain causal order
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from danube_ray.train.memory import keep_freed_memory
from danube_ray.train.pretrain import PretrainTask
from danube_ray.train.protocol import TensorBatch
from tests.benchmarks.gpu.ours import Ours
from tests.benchmarks.gpu.peer import Peer
from tests.benchmarks.gpu.workload import Contestant, batches, with_micro_batch
from tests.benchmarks.nano import nano_run, write_noise
from tests.benchmarks.pairs import compare, record

THREADS, STEPS, WARMUP_TURNS = 2, 2, 4
CPU = torch.device("cpu")
CASES = ("plain", "halved", "packed")


class OneDocument(PretrainTask):
    """Pretraining that doesn't look where documents begin, as the plain loop."""

    def labels(self, batch: TensorBatch) -> torch.Tensor:
        return batch["tokens"][:, 1:].long()

    def loss(self, model: nn.Module, batch: TensorBatch) -> torch.Tensor:
        return model(batch["tokens"][:, :-1].long(), labels=self.labels(batch))


def contestant(who: str, case: str, tokens: Path) -> Contestant:
    run = nano_run(tokens, tokens.parent, "nano", 10_000, THREADS)
    if case == "halved":
        run = with_micro_batch(run, run.stages[0].micro_batch_size // 2)
    if who == "theirs":
        return Peer(run, CPU, "sdpa", compiled=False)
    keep_freed_memory()
    ours = Ours(run, CPU)
    if case != "packed":
        ours.task = OneDocument(run)
    return ours


def serve(who: str, case: str, tokens: Path) -> None:
    """In a process of its own: print the loss of the first step, then tokens/s for each line that comes."""
    torch.set_num_threads(THREADS)
    trained = contestant(who, case, tokens)
    steps = cycle(batches(trained.run))
    print(float(trained.train(next(steps))[0]), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(STEPS):
            trained.train(next(steps))
        print(STEPS * trained.run.global_batch_tokens / (time.perf_counter() - began), flush=True)


class Worker:
    """`serve` in a process; a call trains `STEPS` steps and returns tokens/s."""

    def __init__(self, who: str, case: str, tokens: Path) -> None:
        command = [sys.executable, "-m", __spec__.name, who, case, str(tokens)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.first_loss = self.read()

    def read(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())

    def __call__(self) -> float:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self.read()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()


def main(pairs: int = 40) -> None:
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_noise(Path(folder) / "tokens")
        for case in CASES:
            with Worker("ours", case, tokens) as ours, Worker("theirs", case, tokens) as theirs:
                if case != "packed":
                    assert abs(ours.first_loss - theirs.first_loss) < 1e-4, "they don't do the same work"
                for _ in range(WARMUP_TURNS):
                    ours(), theirs()
                ratio, figures = compare(ours, theirs, pairs)
            speeds = [statistics.median(column) for column in zip(*figures, strict=True)]
            print(f"{case}: our step / transformers': {ratio}  (aim: at least 1.2)")
            print(f"{case}: {speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s on {THREADS} threads")
            result[case] = {"ratio": dataclasses.asdict(ratio), "tokens_per_s": figures}
    record("step_vs_transformers", result)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main()
