"""The steps of a split, without a cluster: nothing is lost, torn work is redone, and bytes are always the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from danube_ray.config import CurationConfig
from danube_ray.curate import splits as steps
from danube_ray.curate.judging import Judging
from danube_ray.curate.records import Split
from danube_ray.curate.sources import plan_splits
from danube_ray.curate.splits import decided_path, document_id, finish_split, judge_split, read_qualities
from danube_ray.curate.tables import DOCUMENTS, DROPPED, DUPLICATES, QUARANTINE, SCORED, TableWriter
from tests.curate.test_heuristics import PROSE

TEXTS = [f"Part {number}. {PROSE}" for number in range(4)]
JUDGING = Judging("inputs", CurationConfig(near_duplicates=False))
SHORT = "min_words"
OF_2 = {"row": 2, "duplicate_of": "ab" * 16, "reason": "duplicate", "similarity": 1.0}


@pytest.fixture
def split(tmp_path) -> Split:
    lines = [json.dumps({"text": text, "url": f"page/{number}"}) for number, text in enumerate(TEXTS)]
    lines.insert(1, json.dumps({"text": "too short"}))
    lines.insert(3, "{torn")
    path = tmp_path / "web.jsonl"
    path.write_text("\n".join(lines))
    return plan_splits("web", str(path), split_bytes=1)[0]


def run(split: Split, work: Path, min_quality: float = 0.0) -> tuple[dict, dict]:
    """Both steps, with one duplicate found between them; what they counted, less the time it took."""
    judged = judge_split(split, JUDGING, work)
    with TableWriter(decided_path(work, split, "duplicates"), DUPLICATES) as duplicates:
        duplicates.add(OF_2)
    final = finish_split(split, min_quality, work)
    return tuple({name: value for name, value in counts.items() if name != "spent"} for counts in (judged, final))


def contents(work: Path) -> dict[str, bytes]:
    """Every file's bytes, of a record all but the time spent."""
    found = {}
    for path in sorted(file for file in work.rglob("*") if file.is_file()):
        record = json.loads(path.read_text()) if path.suffix == ".json" else None
        if record is not None:
            del record["counts"]["spent"]
        found[str(path.relative_to(work))] = path.read_bytes() if record is None else json.dumps(record).encode()
    return found


def test_every_record_lies_in_one_table(split, tmp_path):
    judged, final = run(split, tmp_path / "work")
    assert judged == {
        "read": 6,
        "dropped_by": {SHORT: 1},
        "quarantined_by": {"malformed JSON": 1},
        "skipped_by": {},
        "languages": {"en": 5},
        "masked": {},
    }
    kept_bytes = sum(len(text.encode()) for text in TEXTS) - len(TEXTS[2].encode())
    assert final == {
        "kept": 3,
        "dropped": 2,
        "dropped_late_by": {"duplicate": 1},
        "quarantined": 1,
        "kept_bytes": kept_bytes,
        "lengths": {f"{int(math.log2(len(PROSE))):02}": 3},
        "lengths_dropped": {"03": 1, f"{int(math.log2(len(PROSE))):02}": 1},
        "qualities": {},
    }

    def table(name: str):
        return pq.read_table(tmp_path / "work" / "final" / name / "web" / f"{split.name}.parquet")

    documents, dropped, quarantine = table("documents"), table("dropped"), table("quarantine")
    assert (documents.schema, dropped.schema, quarantine.schema) == (DOCUMENTS, DROPPED, QUARANTINE)
    assert documents["text"].to_pylist() == [TEXTS[0], TEXTS[1], TEXTS[3]]
    assert documents["url"].to_pylist() == ["page/0", "page/1", "page/3"]
    assert documents["id"].to_pylist() == [
        document_id("web", f"page/{number}", TEXTS[number]).hex() for number in (0, 1, 3)
    ]
    assert all(value == len(PROSE.split()) + 2 for value in documents["signal_words"].to_pylist())
    assert dropped["text"].to_pylist() == ["too short", TEXTS[2]]
    assert dropped["reason"].to_pylist() == [SHORT, "duplicate"]
    assert dropped["similarity"].to_pylist() == [None, 1.0]
    assert dropped["duplicate_of"].to_pylist() == [None, "ab" * 16]
    assert dropped["signal_punctuated_lines"].to_pylist() == [None, 1.0]  # not measured, once the reason was clear
    [bad] = quarantine.to_pylist()
    start = Path(split.root, "web.jsonl").read_bytes().index(b"{torn")
    assert bad == {
        "source": "web",
        "url": "web.jsonl",
        "offset": start,
        "reason": "malformed JSON",
        "sample": "{torn\n",
    }


def test_documents_scored_again_are_judged_by_that_score(split, tmp_path):
    work = tmp_path / "work"
    judge_split(split, JUDGING, work)
    assert np.isnan(read_qualities(split, work)).all()
    with TableWriter(decided_path(work, split, "scored"), SCORED) as scored:
        for row, quality in ((0, 0.9), (2, 0.1), (3, 0.2)):
            scored.add({"row": row, "quality": quality})
    _, final = run(split, work, min_quality=0.5)
    assert final["dropped_late_by"] == {"min_quality": 2}  # what is not scored stays; a low one needs no other reason
    assert final["qualities"] == {"0.90": 1}
    kept = pq.read_table(work / "final" / "documents" / "web" / f"{split.name}.parquet")
    assert kept["quality"].to_pylist() == [0.9, None]


def test_a_finished_step_is_not_done_again(split, tmp_path, monkeypatch):
    first = run(split, tmp_path / "work")
    monkeypatch.setattr(steps, "read_split", None)
    monkeypatch.setattr(steps, "TableWriter", None)
    assert run(split, tmp_path / "work") == first


@pytest.mark.parametrize("harm", ["missing", "changed", "record"])
def test_a_torn_step_is_done_again_to_the_same_bytes(split, tmp_path, harm):
    work = tmp_path / "work"
    counts = run(split, work)
    whole = contents(work)
    for name in whole:
        if name.endswith(".json") != (harm == "record"):
            continue
        path = work / name
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-9])
        assert run(split, work) == counts
        assert contents(work) == whole


def test_bytes_do_not_depend_on_the_place_or_the_run(split, tmp_path):
    run(split, tmp_path / "one")
    run(split, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_table_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.parquet"
    with pytest.raises(OSError, match="disk full"), TableWriter(path, QUARANTINE) as table:
        table.add({"source": "web"}, 2**30)
        assert [file.name[0] for file in tmp_path.iterdir()] == ["."]
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with TableWriter(path, QUARANTINE):
        pass
    assert not path.exists()


def test_a_table_is_cut_into_row_groups_by_bytes(tmp_path):
    with TableWriter(tmp_path / "table.parquet", QUARANTINE) as table:
        for number in range(10):
            table.add({"offset": number}, 6 * 2**20)
    metadata = pq.read_metadata(tmp_path / "table.parquet")
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [3, 3, 3, 1]
    assert pq.read_table(tmp_path / "table.parquet")["offset"].to_pylist() == list(range(10))
