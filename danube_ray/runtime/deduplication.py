"""Duplicates among judged splits, by shuffles of Ray Data: candidates meet by key, then clusters by their number.

    exact     half of each fingerprint: documents linked to the first of the same text
    near      the 14 bands of all other documents: linked, too, to the first of the same band
    members   the components of all links: every document in one, and the first of it
    chosen    shingles of the members, by component: what is dropped, and for which document
    final     SOURCE/SPLIT.parquet and summary.json, which become work/duplicates

One shuffle moves about what the object store holds; where there is more, each of several takes a share of the keys.
Each leaves a file of numbers, after which a run that was killed goes on. The result depends neither on the number of
shuffles nor on that of CPUs. docs/deduplication.md counts the bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from danube_ray.artifacts import commit, content_hash, intact, publish, work_folder, write_json
from danube_ray.curate.dedup import BANDS, forest, members
from danube_ray.curate.duplicates import (
    Kind,
    Placed,
    as_verdicts,
    decide,
    pair,
    place,
    read_keys,
    read_members,
    write_duplicates,
)
from danube_ray.curate.records import Split
from danube_ray.curate.splits import decided_path
from danube_ray.runtime.session import session
from danube_ray.runtime.splits import Progress, run_splits

VERSION = 1
PARTITION_BYTES = 32 * 2**20
MAX_READERS = 1024  # tasks that read for one shuffle, each some splits one after the other
KEY_BYTES, MEMBER_BYTES = 16, 100
SHINGLE_BYTES_PER_TEXT_BYTE = 1.5  # a word of five letters and a space gives a shingle of 8


def deduplicate(
    splits: Sequence[Split],
    work: Path,
    *,
    priorities: Mapping[str, int],
    near: bool,
    min_jaccard: float,
    on_progress: Progress | None = None,
    shuffle_bytes: int | None = None,
    partition_bytes: int = PARTITION_BYTES,
) -> None:
    """Choose among the duplicates of judged `splits`, and leave in `work/duplicates` what is dropped.

    Of documents with equal texts, and with `near` of those whose Jaccard similarity in word 5-grams is at least
    `min_jaccard`, the best quality is kept, then the least of `priorities` (by source), then the least id. What is
    there from the same input is verified and left as it is.

    `shuffle_bytes`: about what one shuffle moves; the cluster's object store by default. `partition_bytes`: what one
    task of a shuffle takes in; so much in all is not shuffled.
    """
    inputs = [VERSION, [asdict(split) for split in splits], dict(priorities), near, min_jaccard]
    out, report = work / "duplicates", on_progress or (lambda done, total: None)
    if intact(out, inputs):
        return
    stages = work_folder(out, "deduplicating", content_hash(inputs))
    with session():
        held = shuffle_bytes or int(ray.cluster_resources()["object_store_memory"])
        job = _Job(work, stages, place(splits, work, priorities), near, min_jaccard, held, partition_bytes)
        exact = job.link("exact")
        report(1, 5)
        linked = job.link("near", exact) if near else exact
        report(2, 5)
        _once(stages / "members.npy", lambda: members(np.load(linked, mmap_mode="r")))
        report(3, 5)
        chosen = job.choose(exact, stages / "members.npy")
        report(4, 5)
        job.write_tables(chosen)
    _publish(stages, out, {"documents": job.num_documents, **_summary(chosen)}, content_hash(inputs))
    report(5, 5)


@dataclass(frozen=True)
class _Job:
    """The steps that shuffle; each leaves its files in `stages`, and finds them there another time."""

    work: Path
    stages: Path
    placed: list[Placed]
    near: bool
    min_jaccard: float
    shuffle_bytes: int
    partition_bytes: int

    @property
    def num_documents(self) -> int:
        return self.placed[-1].end if self.placed else 0

    def link(self, kind: Kind, exact: Path | None = None) -> Path:
        """A file of what keys of this kind link, and what `exact` has linked already: a `forest`."""
        placed, num_bytes = self.placed, KEY_BYTES * self.num_documents
        if exact is not None:
            copies = np.load(exact, mmap_mode="r")
            placed, num_bytes = self._with_slices(copies=copies), KEY_BYTES * BANDS * (self.num_documents - len(copies))
        paths, before = self._parts(kind, num_bytes), exact
        for part, path in enumerate(paths):
            read = partial(read_keys, kind=kind, share=(part, len(paths)), work=self.work, exact=exact)
            found = self._meet(placed, read, pair, "key", num_bytes / len(paths))
            _once(path, partial(self._forest, before, found))
            before = path
        return paths[-1]

    def _forest(self, before: Path | None, found: Iterable[pa.Table]) -> np.ndarray:
        linked = [] if before is None else [np.load(before, mmap_mode="r")]
        pairs = (np.stack([table["document"].to_numpy(), table["first"].to_numpy()], axis=1) for table in found)
        return forest(self.num_documents, chain(linked, pairs))

    def choose(self, exact: Path, members: Path) -> list[Path]:
        """Files of VERDICTs on what is dropped, each by document."""
        arrays = {"copies": np.load(exact, mmap_mode="r"), "members": np.load(members, mmap_mode="r")}
        placed = [split for split in self._with_slices(**arrays) if _length(split.members)]
        num_bytes = MEMBER_BYTES * len(arrays["members"])
        if self.near:
            num_bytes += sum(map(_shingle_bytes, placed))
        paths = self._parts("chosen", num_bytes)
        files = {"work": self.work, "exact": exact, "members": members}
        reduce = partial(decide, min_jaccard=self.min_jaccard)
        for part, path in enumerate(paths):
            read = partial(read_members, near=self.near, share=(part, len(paths)), **files)
            found = self._meet(placed, read, reduce, "cluster", num_bytes / len(paths))
            _once(path, partial(as_verdicts, found))
        return paths

    def write_tables(self, chosen: list[Path]) -> None:
        """A table for each split of which something is dropped."""
        slices = [self._slices(np.load(path, mmap_mode="r")["document"]) for path in chosen]
        tasks = []
        for split, *bounds in zip(self.placed, *slices, strict=True):
            files = [(str(path), bound) for path, bound in zip(chosen, bounds, strict=True) if _length(bound)]
            if files:
                tasks.append({"placed": asdict(split), "files": files})
        if tasks:
            run_splits(partial(_write_table, stages=self.stages), tasks, lambda done: None)

    def _parts(self, name: str, num_bytes: float) -> list[Path]:
        """A file for each shuffle that this many bytes take."""
        parts = max(1, math.ceil(num_bytes / self.shuffle_bytes))
        return [self.stages / f"{name}-{part}-of-{parts}.npy" for part in range(parts)]

    def _slices(self, documents: np.ndarray) -> list[tuple[int, int]]:
        """For each split the part of the sorted numbers `documents` that are its own."""
        bounds = [(split.first, split.end) for split in self.placed]
        return [(start, end) for start, end in np.searchsorted(documents, bounds).tolist()]

    def _with_slices(self, **arrays: np.ndarray) -> list[Placed]:
        slices = [self._slices(array[:, 0]) for array in arrays.values()]
        return [
            replace(split, **dict(zip(arrays, bounds, strict=True)))
            for split, *bounds in zip(self.placed, *slices, strict=True)
        ]

    def _meet(
        self,
        placed: list[Placed],
        read: Callable[[Placed], Iterable[pa.Table]],
        reduce: Callable[[pa.Table], pa.Table],
        key: str,
        num_bytes: float,
    ) -> Iterator[pa.Table]:
        """What `reduce` makes of all that `read` gives, once rows of equal `key` are together."""
        partitions = math.ceil(num_bytes / self.partition_bytes)
        if partitions <= 1:
            tables = [table for split in placed for table in read(split)]
            yield from [reduce(pa.concat_tables(tables).combine_chunks())] if tables else []
            return
        rows = [{"placed": json.dumps(asdict(split))} for split in placed]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_READERS))
        dataset = dataset.map_batches(partial(_read_each, read=read), batch_size=None, batch_format="pyarrow")
        # A partition is one block and a block one batch: each call has all rows of many keys.
        dataset = dataset.repartition(partitions, keys=[key])
        dataset = dataset.map_batches(reduce, batch_size=None, batch_format="pyarrow")
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _read_each(rows: pa.Table, read: Callable[[Placed], Iterable[pa.Table]]) -> Iterator[pa.Table]:
    for packed in rows["placed"].to_pylist():
        yield from read(Placed.unpack(json.loads(packed)))


def _write_table(task: dict[str, Any], stages: Path) -> None:
    placed = Placed.unpack(task["placed"])
    path = decided_path(stages, placed.split, "final")
    if not path.is_file():
        parts = [np.load(file, mmap_mode="r")[slice(*bounds)] for file, bounds in task["files"]]
        write_duplicates(placed, np.concatenate(parts), path)


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]


def _shingle_bytes(split: Placed) -> float:
    """About how many bytes of shingles a split brings."""
    fresh = _length(split.members) - _length(split.copies)
    return SHINGLE_BYTES_PER_TEXT_BYTE * split.text_bytes * fresh / split.num_documents


def _once(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file, made where it isn't there: it appears whole and flushed."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        array = make()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)
    return np.load(path, mmap_mode="r")


def _summary(chosen: list[Path]) -> dict[str, Any]:
    """How many are dropped and why; how many clusters there are by their number of documents, the kept one counted."""
    dropped, exact, sizes = 0, 0, Counter[int]()
    for path in chosen:
        verdicts = np.load(path, mmap_mode="r")
        dropped, exact = dropped + len(verdicts), exact + int(verdicts["exact"].sum())
        _, times = np.unique(verdicts["kept"], return_counts=True)
        sizes.update((times + 1).tolist())
    return {"exact": exact, "near": dropped - exact, "clusters": {str(size): sizes[size] for size in sorted(sizes)}}


def _publish(stages: Path, out: Path, summary: dict[str, Any], inputs: str) -> None:
    final = stages / "final"
    write_json(final / "summary.json", summary)
    for torn in final.rglob(".*"):
        torn.unlink()  # what a killed task was writing
    commit(final, inputs=inputs)
    publish(final, out)
    shutil.rmtree(stages)
