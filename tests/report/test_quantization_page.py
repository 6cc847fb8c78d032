"""The section on quantization: what it draws is where the numbers are, and nothing covers anything else."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from danube_ray.artifacts import write_json
from danube_ray.report.page import write_report
from danube_ray.report.plot import Scale
from danube_ray.report.quantization import label_box, overlap, place_labels, quantization, round_sizes
from tests.report.test_page import Page, read_page

LEVELS = (  # level, bytes, mean KL divergence
    ("F32", 15_848_000_000, 2e-9), ("F16", 7_924_000_000, 2e-7), ("Q8_0", 4_210_000_000, 1.4e-3),
    ("Q6_K", 3_251_000_000, 5.5e-3), ("Q4_K_M", 2_394_000_000, 3.1e-2), ("Q4_0", 2_261_000_000, 3.3e-2),
    ("Q3_K_M", 1_941_000_000, 0.1), ("Q2_K", 1_514_000_000, 0.44),
)  # fmt: skip


def row(level: str, size_bytes: int, kld: float, **more: Any) -> dict[str, Any]:
    return {
        **{"level": level, "file": f"{level}.gguf", "bytes": size_bytes, "bits_per_weight": 4.8, "types": {"F32": 9}},
        **{"fallbacks": [], "kld_mean": kld, "kld_error": kld / 20, "kld_p99": 8 * kld, "same_top": 1 - kld / 4},
        **{"perplexity": 9.12, "perplexity_error": 0.2, "reference_perplexity": 9.1, "tokens_per_s": 21.4},
        **{"prompt_tokens_per_s": 88.2, **more},
    }


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [row(*level) for level in LEVELS]


def written(folder: Path, rows: list[dict[str, Any]]) -> Page:
    write_json(folder / "quantization.json", rows)
    return read_page(folder)


def test_a_folder_of_levels_has_a_report_of_its_own(tmp_path, rows):
    page = written(tmp_path, rows)
    assert page.sections == ["quantization"]
    for shown in (
        "What 8 quantized levels",
        "15.8 GB",
        "0.0310",
        "Figure 1.",
        "perplexity alone misranks levels",
        "9.100",
    ):
        assert shown in page.text, shown


def test_dots_lie_at_their_sizes_and_divergences(tmp_path, rows):
    (drawn,) = written(tmp_path, rows).paths("dots")
    places = [tuple(map(float, place.split())) for place in re.findall(r"M([\d.]+ [\d.-]+)h0", drawn)]
    ordered = sorted((size, kld) for _, size, kld in LEVELS)
    sizes, klds = [math.log10(size) for size, _ in ordered], [math.log10(max(kld, 1e-8)) for _, kld in ordered]
    across = [(places[i + 1][0] - places[i][0]) / (sizes[i + 1] - sizes[i]) for i in range(len(places) - 1)]
    down = [(places[i + 1][1] - places[i][1]) / (klds[i] - klds[i + 1]) for i in range(len(places) - 1)]
    assert across == pytest.approx([across[0]] * len(across), rel=0.02) and across[0] > 0
    assert down == pytest.approx([down[0]] * len(down), rel=0.05) and down[0] > 0, "less divergence lies lower"


def test_no_name_covers_a_dot_or_another_name():
    """Also where levels crowd at the left edge, and at the right one."""
    x, y = Scale(0, 10), Scale(0, 10)
    places = [(0.6, 9.0), (0.8, 8.9), (1.5, 8.2), (1.7, 8.1), (5.0, 5.0), (9.8, 1.0), (9.7, 1.6)]
    names = ["Q4_0, Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q8_0", "F16", "BF16"]
    from danube_ray.report import quantization as drawn

    boxes = []
    for label in place_labels(places, names, x, y):
        left, top = label.left / 100 * drawn.PHONE_PX, label.top / 100 * drawn.HEIGHT_PX
        boxes.append(label_box(left, top, drawn.CHARACTER_PX * len(label.text), *drawn.SIDES[label.side]))
        assert boxes[-1][0] >= 0 and boxes[-1][2] <= drawn.PHONE_PX
    assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))


def test_levels_of_one_file_share_a_dot(tmp_path, rows):
    page = written(tmp_path, [*rows, row("Q5_K_M", 2_394_000_000, 3.1e-2)])
    assert "Q4_K_M, Q5_K_M" in page.text
    (drawn,) = page.paths("dots")
    assert drawn.count("h0") == len(LEVELS)


def test_levels_that_were_not_judged_are_still_listed(tmp_path, rows):
    bare = [
        {key: value for key, value in each.items() if "kld" not in key and "perplexity" not in key} for each in rows
    ]
    page = written(tmp_path, bare)
    assert "was not measured" in page.text and "15.8 GB" in page.text and "KL divergence" not in page.text
    assert not page.paths("dots")
    mixed = written(tmp_path, [rows[1], bare[2]])
    assert "Q8_0" in mixed.text and not mixed.paths("dots"), "one judged level is no curve"


def test_scores_and_the_long_context_are_shown(tmp_path, rows):
    task = {"task": "arc", "metric": "acc", "value": 0.61, "stderr": 0.02, "n": 500, "reference": 0.63}
    rows[2]["tasks"] = [{**task, "drop": 0.02, "drop_error": 0.004}]
    for each, found in ((rows[1], 0.98), (rows[4], 0.8)):
        cells = [
            {"length": length, "depth": depth, "found": found, "reference_found": 1.0, "words": 10}
            for length in (2_048, 8_192)
            for depth in (0.0, 1.0)
        ]
        spans = [
            {"start": start, "end": end, "kld_mean": each["kld_mean"] * end / 8_192, "kld_error": None, "same_top": 0.9}
            for start, end in ((0, 2_048), (2_048, 4_096), (4_096, 8_192))
        ]
        each["long_context"] = {"context": 8_192, "by_position": spans, "retrieval": cells, "found": found,
                                "found_error": 0.02, "reference_found": 1.0, "chance": 0.1}  # fmt: skip
    rows[4]["imatrix"] = "imatrix-1.gguf"
    page = written(tmp_path, rows)
    text = page.text.replace(" %", "%")
    assert f"Rounded by an importance matrix: {rows[4]['level']}." in text
    assert "Q8_0 arc acc 0.610 ± 0.020 0.630 0.0200 ± 0.0040 500" in text
    assert "float model 100% 100% 100% F16 98% ± 2% 98% 98% Q4_K_M 80%" in text
    assert "hardly finds" not in text
    assert len(page.paths("joined")) == 2


def test_round_sizes_are_enough_for_any_range():
    for low, high in ((2.39e9, 7.92e9), (0.89e6, 5.1e6), (1.0e6, 1.4e6), (5e8, 6e8), (1e3, 1e12)):
        values = round_sizes(low, high)
        assert values == sorted(values) and all(low <= value <= high for value in values)
    assert len(round_sizes(2.39e9, 7.92e9)) >= 3


def test_nothing_was_quantized(tmp_path):
    assert quantization([]) == {}


def test_the_page_stays_small(tmp_path, rows):
    write_json(tmp_path / "quantization.json", rows)
    assert write_report(tmp_path).stat().st_size < 60_000
