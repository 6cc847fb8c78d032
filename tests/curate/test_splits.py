"""The steps of a split, without a cluster: nothing is lost, torn work is redone, and bytes are always the same."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from danube_ray.curate import splits as steps
from danube_ray.curate.extract import plan_splits
from danube_ray.curate.heuristics import WEB_RULES
from danube_ray.curate.records import Split
from danube_ray.curate.splits import document_id, finish_split, judge_split, read_fingerprints
from danube_ray.curate.tables import DOCUMENTS, DROPPED, QUARANTINE, TableWriter
from tests.curate.test_heuristics import PROSE

LIMIT = 10**6
TEXTS = [f"Part {number}. {PROSE}" for number in range(4)]


@pytest.fixture
def split(tmp_path) -> Split:
    lines = [json.dumps({"text": text, "url": f"page/{number}"}) for number, text in enumerate(TEXTS)]
    lines.insert(1, json.dumps({"text": "too short"}))
    lines.insert(3, "{torn")
    path = tmp_path / "web.jsonl"
    path.write_text("\n".join(lines))
    return plan_splits("web", path, split_bytes=1)[0]


def run(split: Split, work: Path) -> tuple[dict, dict]:
    judged = judge_split(split, WEB_RULES, LIMIT, work)
    assert len(read_fingerprints(split, work)[0]) == 4
    return judged, finish_split(split, {2: "ab" * 16}, work)


def contents(work: Path) -> dict[str, bytes]:
    return {str(path.relative_to(work)): path.read_bytes() for path in sorted(work.rglob("*")) if path.is_file()}


def test_every_record_lies_in_one_table(split, tmp_path):
    judged, final = run(split, tmp_path / "work")
    assert judged == {"read": 6, "dropped_by": {"min_words": 1}, "quarantined_by": {"malformed JSON": 1}}
    kept_bytes = sum(len(text.encode()) for text in TEXTS) - len(TEXTS[2].encode())
    assert final == {"kept": 3, "dropped": 2, "duplicates": 1, "quarantined": 1, "kept_bytes": kept_bytes}

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
    assert dropped["reason"].to_pylist() == ["min_words", "duplicate"]
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
