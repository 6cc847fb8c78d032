"""The page of a curation: complete, bounded, the same each time, and safe against what documents say."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from danube_ray.artifacts import ArtifactError, commit, read_json, write_json
from danube_ray.config import HeuristicRules
from danube_ray.curate.tables import CONTAMINATION, DOCUMENTS, DROPPED, QUARANTINE, TableWriter
from danube_ray.report import curated as reading
from danube_ray.report import samples
from danube_ray.report.curated import (
    ENOUGH_ROWS,
    ROWS_PER_GROUP,
    duplicate_pairs,
    excerpt,
    few,
    read_curated,
    row_groups,
    visible,
)
from danube_ray.report.curation import write_curation_report
from danube_ray.report.funnel import FAMILIES, funnel, losses, stage_of
from danube_ray.report.page import write_report
from danube_ray.report.samples import deciles, marked
from tests.report.made_up_curation import ATTACK, DROPS, SOURCES, write_curation
from tests.report.made_up_run import write_demo
from tests.report.test_page import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_curation(tmp_path_factory.mktemp("curation") / "documents")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_curation_report(folder).read_text())


def write_hostile(folder: Path) -> Path:
    """A curation whose documents, and all that came with them, are an attack."""
    row = {"id": ATTACK, "text": ATTACK, "source": "web", "url": ATTACK, "language": ATTACK, "quality": 0.5}
    dropped = {**row, "id": "2", "reason": "near_duplicate", "duplicate_of": ATTACK, "similarity": 0.8}
    bad = {"source": "web", "url": ATTACK, "offset": 0, "reason": ATTACK, "sample": ATTACK}
    item = {**row, "benchmark": ATTACK, "item": 1, "coverage": 1.0, "question": ATTACK, "evidence": ATTACK}
    for name, schema, rows in (
        ("documents/web/a", DOCUMENTS, [row]),
        ("dropped/web/a", DROPPED, [dropped, {**row, "reason": ATTACK}]),
        ("quarantine/web/a", QUARANTINE, [bad]),
        ("contamination", CONTAMINATION, [item]),
    ):
        with TableWriter(folder / f"{name}.parquet", schema) as table:
            for one in rows:
                table.add(one)
    counts = {"read": 4, "kept": 1, "dropped": 2, "quarantined": 1, "kept_bytes": 90, "languages": {ATTACK: 3}}
    counts |= {"dropped_by": {ATTACK: 1, "near_duplicate": 1}, "quarantined_by": {ATTACK: 1}, "skipped_by": {ATTACK: 1}}
    counts |= {"lengths": {"06": 1}, "lengths_dropped": {"06": 2}, "qualities": {"0.50": 1}, "masked": {ATTACK: 1}}
    facts = {"duplicates": {"exact": 0, "near": 1}, "contaminated": {ATTACK: {"documents": 1, "items": 1}}}
    commit(folder, curation_version=2, inputs=ATTACK, counts={"web": counts}, settings={"mask": [ATTACK]}, **facts)
    write_json(folder / "throughput.json", [{"step": ATTACK, "source": ATTACK, "wall_s": 1.0}])
    return folder


def plain(text: str) -> str:
    return text.replace("\N{NARROW NO-BREAK SPACE}", " ")


def test_everything_of_a_curation_is_shown(page: Page) -> None:
    assert page.sections == [
        *("sources", "funnel", "rules", "dropped", "kept", "distributions", "duplicates", "contamination"),
        *("quarantine", "masked", "throughput", "settings"),
    ]
    said = plain(page.text)
    for expected in (
        "Of 2,776 documents read from 4 sources, 1,666 were kept",
        "min_words drops the most: 242 documents, 9.6 % of those that reach it",
        "max_curly_brackets drops 22.5 % of academic , and 2.6 % of the other sources",
        "language en 227 8.3 %",
        "min_words at least 50 242 9.6 % 172 13.1 % 66 13.6 %",
        "top 10 %",
        "The largest cluster holds 40 documents",
        "gsm8k , item 7",
        "84 % of its n-grams",
        "truncated gzip 3",
        "request (118), image (32)",
        "email 63 31 32",
        "Near-duplicates",
        "2.09 MB/s",
        '"min_jaccard": 0.75',
    ):
        assert expected in said, expected


def test_every_reason_has_samples_with_what_broke_it(page: Page) -> None:
    shown = {a["id"] for _, a in page.elements if (a.get("id") or "").startswith("dropped-")}
    assert shown == {f"dropped-{reason}" for reason in [*DROPS, "duplicate", "near_duplicate"]}
    said = plain(page.text)
    for pattern in (
        r"just missed words 49 , at least 50 is kept",
        r"bullet lines 0\.9\d+ , at most 0\.9 is kept",
        r"language (de|fr|ja|ar) 0\.9\d* ",
        r"quality 0\.1\d+ , at least 0\.2 is kept",
        r"similarity 0\.\d+ of [0-9a-f]{12}",
    ):
        assert re.search(pattern, said), pattern


def test_the_page_asks_nothing_of_the_network(page: Page, folder: Path) -> None:
    links = [a.get("href") or a.get("src") or "" for _, a in page.elements if a.get("href") or a.get("src")]
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert len(links) > 12
    assert all(link == "data:," or link.removeprefix("#") in ids for link in links)
    style = (folder / "report.html").read_text().split("</style>")[0]
    assert not re.search(r"https?://|@import|url\(", style) and "default-src 'none'" in style


def test_what_documents_say_is_text_and_never_markup(page: Page, tmp_path: Path) -> None:
    assert visible(ATTACK) in page.text and "\u202e" not in page.text and "\0" not in page.text
    page = Page(write_curation_report(write_hostile(tmp_path / "documents")).read_text())
    assert len(page.sections) == 12
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in page.elements].count("script") == 3, "one a chart, and the page's own"
    assert page.text.count(visible(ATTACK)) + page.text.count(ATTACK) > 30


def test_a_browser_shows_it_and_runs_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    from tests.serve.browser import headless_chromium

    path = write_curation_report(folder)
    with headless_chromium() as browser:
        browser.driver.get(path.as_uri())
        assert browser.driver.title == "documents · curation · danube_ray"
        assert browser.all("#quarantine .raw")[0].text.startswith("\ufffd\ufffd<script>document.title")
        assert not browser.all("img, main script:not([type='application/json'])")
        assert browser.driver.execute_script("return document.getElementById('dropped-language').open") is False
        browser.driver.execute_script("location.hash = '#dropped-language'")
        browser.wait(lambda: browser.driver.execute_script("return document.getElementById('dropped-language').open"))
        for width in (1280, 390):
            browser.driver.set_window_size(width, 900)
            size = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            full, visible_width = browser.driver.execute_script(size)
            assert full == visible_width, "nothing sticks out sideways"
        assert browser.complaints() == []


def test_the_funnel_ends_with_what_was_kept(folder: Path) -> None:
    curated = read_curated(folder)
    lost = losses(curated)
    assert [loss.reason for loss in lost] == [
        *("quarantine", "blocked_url", "language", "min_words", "max_bullet_lines", "max_duplicate_lines"),
        *("max_curly_brackets", "min_punctuated_lines", "max_code_share", "blocked_word", "contaminated"),
        *("min_quality", "duplicate", "near_duplicate"),
    ]
    rows = funnel(curated, lost)
    assert rows[0]["left"] == sum(row["read"] for row in curated.counts.values())
    assert rows[-1]["left"] == sum(row["kept"] for row in curated.counts.values())
    assert {source: n for source, n, _ in rows[-1]["parts"]} == {s: row["kept"] for s, row in curated.counts.items()}
    for before, row in pairwise(rows[:-1]):
        assert row["left"] == before["left"] - row["dropped"]
        assert row["share"] == pytest.approx(row["dropped"] / before["left"])


def test_every_rule_belongs_to_a_family() -> None:
    rules = [field.name for field in fields(HeuristicRules) if field.name.startswith(("min_", "max_"))]
    by_family = {family: [rule for rule in rules if stage_of(rule) == family] for family in FAMILIES}
    assert sum(map(len, by_family.values())) == len(rules) == 30
    assert by_family["Gopher: repetition"][0] == "max_duplicate_paragraphs"
    assert by_family["Gopher: quality"][-1] == "min_stop_words"


def test_the_same_folder_gives_the_same_page(folder: Path, page: Page) -> None:
    again = write_curation_report(folder).read_text()
    assert Page(again).words == page.words


def test_only_the_chosen_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other file is spoilt, and the page stays the same: it holds however many files a folder has."""
    monkeypatch.setattr(reading, "FILES", 2)
    folder = write_curation(tmp_path / "documents")
    before = write_curation_report(folder).read_bytes()
    curated = read_curated(folder)
    spoilt = 0
    for table in ("kept", "dropped"):
        for source in SOURCES:
            files = curated.files(table, source)
            chosen = {path for path, _, _ in row_groups(files)}
            for path in set(files) - chosen - {curated.files("kept")[0]}:  # the first one's columns are looked at
                path.write_bytes(b"spoilt")
                spoilt += 1
    assert spoilt == 7
    assert write_curation_report(folder).read_bytes() == before


def test_texts_are_read_from_few_row_groups_but_rare_reasons_are_found(tmp_path: Path) -> None:
    """Of thirty files of one reason a few are read whole; that one of them holds another reason shows anyway."""
    for number in range(30):
        rare = ["max_words"] if number == 17 else []
        rows = [{"id": f"{number}", "text": "t", "reason": reason} for reason in ["min_words"] * 40 + rare]
        with TableWriter(tmp_path / f"{number}.parquet", DROPPED) as table:
            for row in rows:
                table.add(row)
    found = few(sorted(tmp_path.glob("*.parquet")), "reason")
    assert {reason: len(rows) for reason, rows in found.items()} == {"min_words": ENOUGH_ROWS, "max_words": 1}
    assert len({row["id"] for row in found["min_words"]}) == ENOUGH_ROWS / ROWS_PER_GROUP


def test_the_nearest_to_its_bound_comes_first(folder: Path) -> None:
    curated = read_curated(folder)
    by_reason = {row["loss"].reason: row["samples"] for row in samples.dropped(curated, losses(curated))}
    for reason, rows in by_reason.items():
        assert [row["reason"] for row in rows] == [reason] * len(rows) and len(rows) <= samples.SAMPLES
        assert [row["barely"] for row in rows[1:]] == [False] * (len(rows) - 1)
        if rows[0]["barely"]:
            assert curated.distance(rows[0]) == min(map(curated.distance, rows)) <= samples.BARELY
    assert by_reason["min_words"][0]["signal_words"] == 49


def test_kept_samples_lie_in_their_tenth(folder: Path) -> None:
    groups = samples.kept(read_curated(folder))
    assert [title for title, _, _ in groups][:2] == ["top 10 %", "10 to 20 %"] and len(groups) == 10
    bounds = []
    for _, span, rows in groups:
        low, high = (float(edge) for edge in re.findall(r"\d\.\d+", span))
        assert all(low - 0.005 <= row["quality"] <= high + 0.005 for row in rows) and len(rows) == 2
        bounds.append((low, high))
    assert bounds == sorted(bounds, reverse=True)


def test_deciles_of_counts() -> None:
    assert deciles({}) == [] and deciles({"0.50": 0}) == []
    assert deciles({"0.50": 10}) == pytest.approx([0.5 + 0.005 * part for part in range(11)])
    edges = deciles({"0.00": 50, "0.95": 50})
    assert edges[5] == pytest.approx(0.05) and edges[10] == pytest.approx(1.0) and edges[6] == pytest.approx(0.96)


def test_pairs_are_duplicates_and_what_differs_is_marked(folder: Path) -> None:
    curated = read_curated(folder)
    found = duplicate_pairs(curated, samples.PAIRS)
    assert [dropped["reason"] for dropped, _ in found] == ["near_duplicate"] * 6 + ["duplicate"] * 2
    assert all(dropped["duplicate_of"] == kept["id"] for dropped, kept in found)
    similarities = [dropped["similarity"] for dropped, _ in found[:6]]
    assert similarities == sorted(similarities)
    for shown in samples.pairs(curated)[:6]:
        assert {text for text, apart in shown["dropped"]["parts"] if apart} == {"altogether"}
    for shown in samples.pairs(curated)[6:]:
        assert not [text for side in ("dropped", "kept") for text, apart in shown[side]["parts"] if apart]


def test_a_pair_that_differs_at_the_end_is_shown_there() -> None:
    text = "the mill stood still " * 100
    shown = samples.pair({"text": f"{text}and so on", "similarity": 0.9}, {"text": text})
    assert shown["dropped"]["parts"][0][0].startswith("…")
    assert [text.strip() for text, apart in shown["dropped"]["parts"] if apart] == ["and so on"]


def test_the_end_of_an_excerpt_is_no_difference() -> None:
    same = "the mill stood still " * 100
    first, second = marked(f"{same} end", f"an {same}")
    assert [text for text, apart in first if apart] == []
    assert [text for text, apart in second if apart] == ["an"]
    assert "".join(text for text, _ in first).endswith(" …")


def test_excerpts_are_bounded_and_show_what_hides() -> None:
    assert excerpt("short\r\n\n\n\ntext ") == "short\n\ntext"
    assert len(excerpt("word " * 1_000)) <= reading.EXCERPT_CHARS + 2
    assert len(excerpt("x" * 5_000)) == reading.EXCERPT_CHARS + 2
    assert excerpt("a\n" * 100).count("\n") == reading.EXCERPT_LINES - 1
    assert visible("\x1b[31m\u202eab\u2066\x00\x9b\tc") == "\ufffd[31m\ufffdab\ufffd\ufffd\ufffd\tc"


def test_the_histograms_hold_every_document(folder: Path) -> None:
    text = write_curation_report(folder).read_text()
    readouts = [json.loads(part) for part in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    sums = [
        {row["label"]: sum(int(value.replace(",", "") or 0) for value in row["values"]) for row in readout["rows"]}
        for readout in readouts
    ]
    counts = read_curated(folder).counts
    kept = sum(row["kept"] for row in counts.values())
    by_source = {source: row["kept"] for source, row in counts.items()}
    assert sums[0] == {"kept": kept, "dropped": sum(row["dropped"] for row in counts.values()), **by_source}
    assert sums[1] == {"kept": kept, **by_source}
    assert "quality 0.85 to 0.90" in readouts[1]["heads"] and "1,024 to 2,047 characters" in readouts[0]["heads"]


def test_without_scores_the_kept_are_shown_by_source(tmp_path: Path) -> None:
    page = Page(write_curation_report(write_curation(tmp_path / "documents", scored=False)).read_text())
    assert "Some kept documents of each source." in page.text and "quality score" not in page.text
    assert [title for title, _, _ in samples.kept(read_curated(tmp_path / "documents"))] == list(SOURCES)


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    """A manifest of bare counts, no table, a source of nothing: the page says what it knows."""
    bare = {"read": 0, "kept": 0, "dropped": 0, "quarantined": 0, "kept_bytes": 0}
    (tmp_path / "documents").mkdir()
    commit(tmp_path / "documents", curation_version=2, counts={"web": bare})
    page = Page(write_curation_report(tmp_path / "documents").read_text())
    assert page.sections == ["sources", "settings"]
    assert "Of 0 documents read from 1 source," in page.text


def test_a_bound_is_told_only_where_it_is_known(folder: Path, tmp_path: Path) -> None:
    curated = read_curated(folder)
    assert curated.limit("min_words", "web") == 50 and curated.limit("near_duplicate", "web") == 0.75
    assert curated.limit("duplicate", "web") is None
    manifest = read_json(folder / "manifest.json")
    manifest["settings"]["rule_sets"] = {"books": "prose"}
    write_json(tmp_path / "manifest.json", manifest)
    assert read_curated(tmp_path).limit("min_words", "web") == 50
    assert read_curated(tmp_path).limit("min_words", "books") is None
    manifest["settings"]["rules"] = {"books": {"min_words": 20}}
    write_json(tmp_path / "manifest.json", manifest)
    assert read_curated(tmp_path).limit("min_words", "books") == 20
    manifest["settings"]["rules"] = {source: {"min_words": 50} for source in ("web", "wiki", "academic")}
    manifest["settings"]["rules"]["books"] = {"min_words": 20}
    write_json(tmp_path / "manifest.json", manifest)
    page = plain(Page(write_curation_report(tmp_path).read_text()).text)
    assert re.search(r"172 \S+ % at least 50 66 \S+ % at least 50 3 \S+ % at least 50 1 \S+ % at least 20", page)


@pytest.mark.parametrize(("make", "said"), [(False, "is not a folder"), (True, "holds no finished curation")])
def test_another_folder_is_one_clear_error(tmp_path: Path, make: bool, said: str) -> None:
    if make:
        (tmp_path / "tokens").mkdir()
        commit(tmp_path / "tokens", counts={})
    with pytest.raises(ArtifactError, match=said):
        write_curation_report(tmp_path / "tokens")


def test_a_run_links_to_the_page_of_its_curation(tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo")
    assert "The page of this curation" not in write_report(demo).read_text()
    write_curation(demo / "documents")
    write_curation_report(demo / "documents")
    page = Page(write_report(demo).read_text())
    assert "documents/report.html" in [a.get("href") for _, a in page.elements]
    assert "Of 2,776 documents read, 1,666 were kept" in page.text
