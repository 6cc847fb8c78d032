"""`danube quantize` as its user runs it."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from danube_ray.cli import main
from danube_ray.cli.comparison import read_ids
from danube_ray.cli.levels import print_table
from tests.models import TEXT, tiny_model


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


def run(capsys, *arguments: str) -> tuple[int, str]:
    status = 0
    try:
        main(["quantize", *arguments])
    except SystemExit as ended:
        status = ended.code
    told = capsys.readouterr()
    return status, plain(told.out + told.err)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 12))
    return tmp_path / "text.txt"


def test_an_estimate_says_the_sizes_that_danube3_published(capsys):
    status, said = run(capsys, "--estimate", "danube3_4b")
    assert status == 0
    assert "F16 7.92 GB 16.00 8.68 GB" in said and "Q4_K_M 2.39 GB 4.83 3.15 GB" in said
    assert "8,192 tokens (755 MB)" in said and "no weight read" in said


def test_an_estimate_of_some_levels_and_another_context(capsys, model):
    status, said = run(capsys, str(model), "--estimate", "--levels", "Q8_0", "Q4_K_M", "--context", "128")
    assert status == 0 and "cache of 128 tokens" in said
    assert "F16" not in said and "Rows too short for their blocks make these larger: Q4_K_M." in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--levels", "Q9"], "level is 'Q9', allowed is F32, F16"),
        (["--target-size", "2GB", "--max-kld", "0.1"], "--target-size and --max-kld is 'both'"),
        (["--target-size", "much"], "such as 2.5GB"),
        (["--target-size", "1kB"], "this model at"),
        (["--max-kld", "0.1"], "used with --tokens or --text"),
        (["--max-kld", "-1"], "greater than 0"),
        (["--long-context"], "used with --tokens or --text"),
        (["--text", "TEXT", "--tokens", "TEXT"], "--tokens and --text is 'both'"),
        (["--text", "/nowhere"], "a file or folder that exists"),
        (["--text", "TEXT", "--calibration", "TEXT"], "another text than --text"),
        (["--imatrix", "TEXT", "--calibration", "TEXT"], "--imatrix and --calibration is 'both'"),
        (["--text", "TEXT", "--context", "257"], "2 to 256, which llama.cpp can use"),
        (["--estimate", "--context", "257"], "2 to 256, which llama.cpp can use"),
        (["--text", "TEXT", "--num-tokens", "1"], "at least 2"),
        (["--tasks", "arc=/nowhere"], "a path that exists"),
        (["--threads", "-1"], "0 or more"),
        (["--imatrix", "TEXT"], "a whole GGUF file by llama-imatrix or danube"),
        (["--calibration", "/nowhere"], "a file or folder that exists"),
        (["--out", "TEXT"], "File exists"),
        (["--out", "TEXT/gguf"], "Not a directory"),
    ],
)
def test_a_mistake_is_one_error_before_work_starts(capsys, model, text, tmp_path, options, said, monkeypatch):
    monkeypatch.setattr("danube_ray.runtime.session.ray.init", None)
    out = tmp_path / "out"
    options = [option.replace("TEXT", str(text)) for option in options]
    status, told = run(capsys, str(model), "--out", str(out), *options)
    assert status == 2 and said in told
    assert not out.exists()


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.*"])
def test_a_folder_that_lacks_a_part_is_an_error_before_work_starts(capsys, model, tmp_path, lost, monkeypatch):
    monkeypatch.setattr("danube_ray.runtime.session.ray.init", None)
    folder = shutil.copytree(model, tmp_path / "model")
    for file in folder.glob(lost):
        file.unlink()
    status, told = run(capsys, str(folder), "--out", str(tmp_path / "out"))
    assert status == 2 and lost.rstrip("*") in told
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_named(capsys, tmp_path):
    assert "a folder with config.json, or one of danube_1_8b" in run(capsys, "/nowhere")[1]
    assert "a preset has no weights" in run(capsys, "danube3_4b")[1]
    assert "/nowhere" in run(capsys, "/nowhere", "--estimate")[1]


def test_tokens_of_another_tokenizer_are_refused(capsys, model, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    status, told = run(capsys, str(model), "--tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "out"))
    assert status == 2 and "write the tokens with the model's own tokenizer" in told


def test_a_text_is_read_by_either_kind_of_tokenizer(model, text, tmp_path):
    """Our own folders hold both, of the same pieces; a Llama 3 folder has the one that `tokenizers` reads alone."""
    shutil.copy(model / "tokenizer.json", tmp_path)
    ids = read_ids(text, model, 300)
    assert len(ids) == 300 and ids.tolist() == read_ids(text, tmp_path, 300).tolist()


@pytest.mark.ray
@pytest.mark.slow
def test_levels_are_made_measured_and_reported(ray_session, capsys, model, text, tmp_path):
    out = tmp_path / "out"
    status, said = run(capsys, str(model), "--text", str(text), "--levels", "F16", "Q4_0", "--out", str(out),
                       "--threads", "1", "--context", "64")  # fmt: skip
    assert status == 0, said
    rows = json.loads((out / "quantization.json").read_text())
    assert [row["level"] for row in rows] == ["F16", "Q4_0"] and all(row["positions"] > 100 for row in rows)
    assert "KLD mean" in said and "perplexity alone misranks levels" in said
    assert "Q4_0" in (out / "report.html").read_text()


@pytest.mark.ray
def test_without_a_text_files_are_made_and_timed(ray_session, capsys, model, tmp_path):
    status, said = run(capsys, str(model), "--levels", "Q8_0", "--out", str(tmp_path / "out"), "--threads", "1")
    assert status == 0 and "--text FILE or --tokens FOLDER adds" in said and "KLD mean" not in said
    (row,) = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert row["tokens_per_s"] > 0 and "kld_mean" not in row


@pytest.mark.ray
def test_a_size_and_a_divergence_pick_a_level(ray_session, capsys, model, text, tmp_path):
    out = tmp_path / "size"
    status, said = run(capsys, str(model), "--target-size", "700kB", "--out", str(out), "--threads", "1")
    assert status == 0, said
    (row,) = json.loads((out / "quantization.json").read_text())
    assert row["bytes"] <= 700_000 and f"chosen {out / row['file']}" in said and "the most bits within 700 kB" in said

    out = tmp_path / "kld"
    options = ["--text", str(text), "--out", str(out), "--threads", "1", "--context", "64", "--num-tokens", "500"]
    status, said = run(capsys, str(model), "--max-kld", "0.02", *options)
    assert status == 0, said
    *rejected, chosen = sorted(json.loads((out / "quantization.json").read_text()), key=lambda row: row["bytes"])
    assert rejected and all(row["kld_mean"] > 0.02 for row in rejected) and chosen["kld_mean"] <= 0.02
    assert f"chosen {out / chosen['file']}" in said and "tried from the smallest: " in said
    status, said = run(capsys, str(model), "--max-kld", "1e-9", "--levels", "Q4_0", *options)
    assert status == 2 and "what Q4_0 has, the nearest of those tried" in said


@pytest.mark.ray
def test_an_importance_matrix_is_gathered_once(ray_session, capsys, model, text, tmp_path):
    (tmp_path / "calibration.txt").write_text(" ".join(reversed(TEXT * 12)))
    out = tmp_path / "out"
    options = [
        "--calibration",
        str(tmp_path / "calibration.txt"),
        "--levels",
        "Q4_0",
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    assert run(capsys, str(model), *options)[0] == 0
    (matrix,) = out.glob("imatrix-*.gguf")
    written = matrix.stat().st_mtime_ns
    assert run(capsys, str(model), *options)[0] == 0
    assert matrix.stat().st_mtime_ns == written


def test_every_table_fits_100_columns(capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr("danube_ray.cli.levels.console", Console(width=100))
    spans = [{"start": 0, "end": end, "kld_mean": 1.234e-8, "kld_error": None, "same_top": 0.9} for end in
             (512, 1_024, 2_048, 4_096, 8_192)]  # fmt: skip
    far = {"context": 8_192, "by_position": spans, "retrieval": [], "found": 0.987, "found_error": 0.0123,
           "reference_found": 0.99, "chance": 0.1}  # fmt: skip
    task = {"task": "arc_challenge_25", "metric": "acc_norm", "value": 0.5432, "stderr": 0.0123, "n": 10_042,
            "reference": 0.5555, "drop": -0.0123, "drop_error": 0.00456}  # fmt: skip
    row = {"level": "Q4_K_M", "bytes": 15_848_093_440, "bits_per_weight": 32.0, "kld_mean": 1.2345e-8,
           "kld_error": 1.2e-10, "kld_p99": 1.2e-7, "same_top": 0.98765, "perplexity": 1234.5,
           "perplexity_error": 123.4, "reference_perplexity": 1234.5, "tokens_per_s": 12_345.6,
           "prompt_tokens_per_s": 123_456.7,
           "speed_threads": 16, "fallbacks": [], "types": {}, "tasks": [task], "long_context": far}  # fmt: skip
    print_table([row])
    said = capsys.readouterr().out
    assert all(len(line) <= 100 for line in said.splitlines()) and "…" not in said
    lines = [line for line in said.splitlines() if line.startswith("Q4_K_M")]
    assert len(lines) == 3 and lines[0].endswith("123k"), "one line a row and table, nothing wrapped"
