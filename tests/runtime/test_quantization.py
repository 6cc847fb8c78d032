from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from danube_ray import presets
from danube_ray.artifacts import read_json
from danube_ray.config import ConfigError, ServedModel
from danube_ray.inference.gguf import GgufModel
from danube_ray.quantize import gguf
from danube_ray.quantize.gguf import convert
from danube_ray.quantize.imatrix import ImportanceMatrix
from danube_ray.runtime import quantization
from danube_ray.runtime.quantization import gather_imatrix, quantize
from danube_ray.serve.models import entry_of
from tests.benchmarks.curation_memory import Peak
from tests.models import tiny_model
from tests.quantize.random_model import write_random_model

DRIVER = "from tests.runtime.test_quantization import drive; drive()"
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 8}
TOKENS = np.random.default_rng(0).integers(3, 512, 600).astype(np.uint16)


def levels_there(out: Path) -> dict[str, int]:
    """Each level's file: one that is written again is another."""
    return {path.stem: path.stat().st_ino for path in out.glob("*.gguf")}


def drive() -> None:
    """What a driver's process runs: `python -c DRIVER MODEL OUT MOMENT`. It kills itself at that moment."""
    folder, out, moment = sys.argv[1:]

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    gguf.SPAN_WEIGHTS = 2**15
    if moment == "before the table":
        quantization.write_json = die
    quantize(Path(folder), Path(out), ["Q8_0", "F16", "Q4_K_M"], on_progress=die if moment == "half-way" else nothing)


def nothing(*_: int) -> None:
    """No progress to be told."""


@pytest.mark.ray
def test_levels_are_made_and_kept(ray_session, tmp_path):
    folder, out = tiny_model(tmp_path / "model"), tmp_path / "gguf"
    made = []

    def run(levels):
        before = levels_there(out)
        rows = quantize(folder, out, levels)
        made[:] = [row["level"] for row in rows if levels_there(out)[row["level"]] != before.get(row["level"])]
        return rows

    run(["Q8_0"])
    rows = run(["Q4_K_M", "F16", "Q8_0"])
    assert made == ["F16", "Q4_K_M"]
    assert [row["level"] for row in rows] == ["F16", "Q8_0", "Q4_K_M"]
    assert rows == json.loads((out / "quantization.json").read_text())
    for row in rows:
        assert row["bytes"] == (out / row["file"]).stat().st_size
        with GgufModel(out / row["file"]) as model:
            assert model.vocab_size == 512
        assert entry_of(ServedModel(weights=out / row["file"])).context_tokens == 256
    for wider, narrower in pairwise(rows):
        assert wider["bits_per_weight"] > narrower["bits_per_weight"]
    assert len(rows[2]["fallbacks"]) == 16

    (out / "Q8_0.gguf").write_bytes(b"torn")
    again = run(["F16", "Q8_0", "Q4_K_M"])
    assert made == ["Q8_0"]
    assert [row["sha256"] for row in again] == [row["sha256"] for row in rows]

    tiny_model(folder, seed=1)
    run(["F16"])
    assert made == ["F16"]
    assert [row["level"] for row in json.loads((out / "quantization.json").read_text())] == ["F16"]


@pytest.mark.ray
def test_tasks_write_what_one_process_writes(ray_session, tmp_path, monkeypatch):
    folder = tiny_model(tmp_path / "model", **SHAPE)
    monkeypatch.setattr(gguf, "SPAN_WEIGHTS", 2**15)
    seen = []
    quantize(folder, tmp_path / "gguf", ["Q4_K_M", "F16"], on_progress=lambda *done: seen.append(done))
    assert seen == [(done, seen[-1][1]) for done in range(1, len(seen) + 1)]
    assert len(seen) > 75  # one for each tensor at least
    monkeypatch.undo()
    for level in ("F16", "Q4_K_M"):
        convert(folder, tmp_path / "alone.gguf", level)
        assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "gguf" / f"{level}.gguf").read_bytes()


@pytest.mark.ray
@pytest.mark.slow
def test_whoever_is_killed_half_written_files_never_count(ray_session, tmp_path):
    folder, out = tiny_model(tmp_path / "model", **SHAPE), tmp_path / "gguf"
    quantize(folder, out, ["Q8_0"])
    first = levels_there(out)
    for moment in ("half-way", "before the table"):
        driver = subprocess.run([sys.executable, "-c", DRIVER, folder, out, moment], capture_output=True, check=False)
        assert driver.returncode == -signal.SIGKILL, driver.stderr
        assert [row["level"] for row in read_json(out / "quantization.json")] == ["Q8_0"]
    assert levels_there(out)["Q8_0"] == first["Q8_0"]
    (out / ".Q4_K_M.gguf.torn").write_bytes(b"what the first driver left, had the second not removed it")

    killed = []

    def kill_workers(done: int, spans: int) -> None:
        if done == 1:
            below = psutil.Process().children(recursive=True)
            killed.extend(process for process in below if "ray::write_span" in " ".join(process.cmdline()))
            for process in killed:
                process.kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "SPAN_WEIGHTS", 2**15)
        rows = quantize(folder, out, ["Q8_0", "F16", "Q4_K_M"], on_progress=kill_workers)
    assert killed and [row["level"] for row in rows] == ["F16", "Q8_0", "Q4_K_M"]
    assert levels_there(out)["Q8_0"] == first["Q8_0"]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    for level in ("F16", "Q4_K_M"):
        convert(folder, tmp_path / "alone.gguf", level)
        assert (tmp_path / "alone.gguf").read_bytes() == (out / f"{level}.gguf").read_bytes()


@pytest.mark.ray
def test_an_importance_matrix_is_gathered_and_used(ray_session, tmp_path):
    folder, out = tiny_model(tmp_path / "model"), tmp_path / "gguf"
    plain = quantize(folder, out, ["Q4_0"])[0]
    imatrix = gather_imatrix(folder, TOKENS, out / "imatrix.gguf", dataset="noise", context=64)
    assert ImportanceMatrix.read(imatrix).counts["blk.1.ffn_down.weight"] == len(TOKENS)
    weighed = quantize(folder, out, ["Q4_0"], imatrix=imatrix)[0]
    assert weighed["sha256"] != plain["sha256"]
    before = levels_there(out)
    rows = quantize(folder, out, ["Q4_0"], imatrix=imatrix)
    assert levels_there(out) == before and [row["imatrix"] for row in rows] == ["imatrix.gguf"]
    rows = quantize(folder, out, ["F16"])
    assert [(row["level"], row["imatrix"]) for row in rows] == [("F16", None), ("Q4_0", "imatrix.gguf")]
    assert rows == read_json(out / "quantization.json"), "one table for all levels of a model"
    with pytest.raises(ConfigError, match="context is 257, allowed is 2 to 256"):
        gather_imatrix(folder, TOKENS, out / "imatrix.gguf", dataset="noise", context=257)


@pytest.mark.ray
def test_an_error_in_a_task_is_said_in_its_own_words_and_leaves_the_old_files(ray_session, tmp_path):
    folder, out = tiny_model(tmp_path / "model"), tmp_path / "gguf"
    quantize(folder, out, ["F16"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_up\.weight is 'not finite'"):
        quantize(folder, out, ["F16", "Q8_0"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_wrong_settings_are_named_before_workers_start(tmp_path):
    folder = tiny_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="level is 'Q9'"):
        quantize(folder, tmp_path / "gguf", ["Q9"])
    with pytest.raises(ConfigError, match="levels is"):
        quantize(folder, tmp_path / "gguf", [])
    with pytest.raises(ConfigError, match=r"importance matrix is .*none\.gguf"):
        quantize(folder, tmp_path / "gguf", imatrix=tmp_path / "none.gguf")
    assert not (tmp_path / "gguf").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_danube3_500m_is_quantized_in_little_memory(ray_session, tmp_path):
    folder = write_random_model(tmp_path / "model", presets.danube3_500m().model)
    with Peak() as peak:
        rows = quantize(folder, tmp_path / "gguf", ["F16", "Q4_K_M"])
    most_mib = max(peak.mib.values())
    print(f"peak {most_mib:,.0f} MiB of this process and all of Ray's")
    assert most_mib * 2**20 < 6e9
    sizes = {row["level"]: row["bytes"] / 1e9 for row in rows}
    assert sizes == {"F16": pytest.approx(1.027, rel=0.01), "Q4_K_M": pytest.approx(0.317, rel=0.01)}
    assert [row["fallbacks"] for row in rows] == [[], []]
    with GgufModel(tmp_path / "gguf" / "Q4_K_M.gguf", context_length=64) as model:
        assert np.isfinite(model.logits([1, 5, 9])).all()
