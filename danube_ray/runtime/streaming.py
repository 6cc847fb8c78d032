"""Ray Data as the stream of a training run: rows are step numbers, tasks gather data, one ordered iterator a rank.

The order of the data is the `StepReader`'s alone. Ray Data brings it to the workers ahead of time, from whichever node
has a CPU free, and may finish blocks in any order: `preserve_order` hands them over in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.data
import ray.train
from ray.data import DataIterator, Dataset
from safetensors.numpy import load, save

from danube_ray.train.protocol import Batch, StepReader

BLOCK_BYTES = 16 * 2**20
# A rank's stream holds at most this much in the object store, and one CPU: it runs ahead by a few blocks, not more.
STREAM_BYTES = 8 * BLOCK_BYTES
STREAM_CPUS = 1


class Gather:
    """Turns step numbers into one rank's batches, each a flat binary row in safetensors' format: no pickle."""

    def __init__(self, reader: StepReader, rank: int, world_size: int) -> None:
        self.reader, self.rank, self.world_size = reader, rank, world_size

    def __call__(self, steps: pa.Table) -> pa.Table:
        numbers = steps["id"].to_pylist()
        rows = [save(self.reader(number, self.rank, self.world_size)) for number in numbers]
        return pa.table({"step": pa.array(numbers, pa.int64()), "batch": pa.array(rows, pa.large_binary())})


def steps_dataset(reader: StepReader, start_step: int) -> Dataset:
    """The steps still to train, as rows, cut so that a block of gathered batches stays under `BLOCK_BYTES`."""
    row_bytes = len(save(reader(reader.num_steps - 1, 0, 1)))
    steps_per_block = max(1, BLOCK_BYTES // row_bytes)
    remaining = reader.num_steps - start_step
    blocks = max(1, -(-remaining // steps_per_block))
    numbers = ray.data.range(remaining, override_num_blocks=blocks)
    return numbers.map_batches(Shift(start_step), batch_format="pyarrow", batch_size=None)


class Shift:
    """Adds the first step's number to rows that count from 0."""

    def __init__(self, start_step: int) -> None:
        self.start_step = start_step

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.table({"id": pa.array((rows["id"].to_numpy() + self.start_step), pa.int64())})


class RankStreams(ray.train.DataConfig):
    """Gives each training worker a stream of its own instead of a share of a common one.

    A common stream (`streaming_split`) makes every rank wait for the slowest and can't begin in the middle; here rank
    and world size enter the gathering, so any number of workers reads the same global order.
    """

    def __init__(self, reader: StepReader) -> None:
        super().__init__()
        self.reader = reader

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        return [
            {name: stream(steps, self.reader, rank, world_size) for name, steps in datasets.items()}
            for rank in range(world_size)
        ]


def stream(steps: Dataset, reader: StepReader, rank: int, world_size: int) -> DataIterator:
    """The gathered, ordered stream of one rank."""
    gathered = steps.map_batches(Gather(reader, rank, world_size), batch_format="pyarrow", batch_size=None)
    gathered.context.enable_progress_bars = False
    options = gathered.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(cpu=STREAM_CPUS, object_store_memory=STREAM_BYTES)
    return gathered.iterator()


def read_stream(iterator: DataIterator) -> Iterator[tuple[int, Batch]]:
    """`(step, batch)` of a rank's stream; one block is fetched ahead while another is trained on."""
    # Whole blocks (batch_size None) are documented, but not in the signature's types.
    blocks: Any = iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)  # type: ignore[arg-type]
    for block in blocks:
        for step, batch in zip(block["step"].to_pylist(), block["batch"], strict=True):
            yield step, load(batch.as_py())
