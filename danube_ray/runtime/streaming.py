"""Ray Data as the stream of a training run: rows are step numbers, tasks gather data, one ordered iterator a rank.

The order of the data is the `StepReader`'s alone. Ray Data brings it to the workers ahead of time, from whichever node
it likes, and may finish blocks in any order: `preserve_order` hands them over in the order of the steps. Its tasks are
short, and ask for no logical CPU: where the training workers have taken them all, as elastic ones do when they grow,
they would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
import ray.train
from ray.data import DataIterator, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from safetensors.numpy import load, save

if TYPE_CHECKING:  # it imports torch, which the processes that Ray starts for the stream need not wait for
    from danube_ray.train.protocol import Batch, StepReader

BLOCK_BYTES = 16 * 2**20
# A rank's stream holds at most this much in the object store: it runs ahead by a few blocks, not more.
STREAM_BYTES = 8 * BLOCK_BYTES
# How its tasks run: one at a time.
TASKS: dict[str, Any] = {"num_cpus": 0, "concurrency": 1}


class Steps(Datasource):
    """The numbers of the steps from `start` to `end`, as rows, `per_block` in a block."""

    def __init__(self, start: int, end: int, per_block: int) -> None:
        super().__init__()
        self.steps, self.per_block = range(start, end), per_block

    @property
    def num_blocks(self) -> int:
        return -(-len(self.steps) // self.per_block)

    def estimate_inmemory_data_size(self) -> int:
        return 8 * len(self.steps)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        firsts = range(0, len(self.steps), self.per_block)
        return [self.read_task(self.steps[first : first + self.per_block]) for first in firsts]

    def read_task(self, steps: range) -> ReadTask:
        facts = BlockMetadata(num_rows=len(steps), size_bytes=8 * len(steps), input_files=None, exec_stats=None)
        return ReadTask(lambda: [pa.table({"step": pa.array(steps, pa.int64())})], facts)


class Gather:
    """Turns step numbers into one rank's batches, each a flat binary row in safetensors' format: no pickle."""

    def __init__(self, reader: StepReader, rank: int, world_size: int) -> None:
        self.reader, self.rank, self.world_size = reader, rank, world_size

    def __call__(self, steps: pa.Table) -> pa.Table:
        numbers = steps["step"].to_pylist()
        rows = [save(self.reader(number, self.rank, self.world_size)) for number in numbers]
        return steps.append_column("batch", pa.array(rows, pa.large_binary()))


def steps_dataset(reader: StepReader, start_step: int) -> Dataset:
    """The steps still to train, as rows, cut so that a block of gathered batches stays under `BLOCK_BYTES`."""
    row_bytes = len(save(reader(reader.num_steps - 1, 0, 1)))
    steps = Steps(start_step, reader.num_steps, max(1, BLOCK_BYTES // row_bytes))
    return ray.data.read_datasource(steps, override_num_blocks=max(1, steps.num_blocks), **TASKS)


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
    gathered = steps.map_batches(Gather(reader, rank, world_size), batch_format="pyarrow", batch_size=None, **TASKS)
    gathered.context.enable_progress_bars = False
    options = gathered.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=STREAM_BYTES)
    return gathered.iterator()


def read_stream(iterator: DataIterator) -> Iterator[tuple[int, Batch]]:
    """`(step, batch)` of a rank's stream; one block is fetched ahead while another is trained on."""
    # Whole blocks (batch_size None) are documented, but not in the signature's types.
    blocks: Any = iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)  # type: ignore[arg-type]
    for block in blocks:
        for step, batch in zip(block["step"].to_pylist(), block["batch"], strict=True):
            yield step, load(batch.as_py())
