"""Train quality models, and score documents with the encoder, on Ray: Ray Data carries splits, Ray Train the loop."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from danube_ray.artifacts import (
    commit,
    content_hash,
    file_hash,
    intact,
    provenance,
    publish,
    require_replaceable,
    work_folder,
)
from danube_ray.config import EncoderConfig, LoopConfig, OptimizerConfig, require, to_dict
from danube_ray.curate.quality import Encoder, QualityModel, QualitySettings
from danube_ray.curate.quality.building import write_base, write_graph
from danube_ray.curate.quality.card import write_card
from danube_ray.curate.quality.control import control
from danube_ray.curate.quality.encoder import TorchRunner, load_tokenizer
from danube_ray.curate.quality.examples import Passages, gather_split, load_passages
from danube_ray.curate.quality.fitting import calibrate_encoder, fit, for_encoder, measure
from danube_ray.curate.quality.gbm import FEATURES
from danube_ray.curate.quality.model import ENCODER, VERSION
from danube_ray.curate.quality.scoring import score_split
from danube_ray.curate.records import Split
from danube_ray.curate.sources import plan_splits
from danube_ray.curate.splits import verified
from danube_ray.runtime.session import session
from danube_ray.runtime.splits import Progress, StepProgress, map_splits, run_split, run_splits
from danube_ray.train.progress import Progress as TrainingProgress

CPU_MICRO_BATCH = 4  # small ones of about equal lengths: a CPU gains nothing from more rows, and loses by padding
COMPARED = 32  # texts whose int8 and float32 log-odds are compared


def train(
    good: Mapping[str, str | Path],
    raw: Mapping[str, str | Path],
    out: Path,
    settings: QualitySettings | None = None,
    on_progress: StepProgress | None = None,
    progress: TrainingProgress | None = None,
) -> Path:
    """Train both quality models on sources of `good` and of `raw` text; `out` appears complete, with its card.

    A folder made from the same input is left as it is, and a training that was killed goes on. The passages are held in
    this process's memory, about 20 kB each: sources are samples. Raises `ConfigError` before any work, `ArtifactError`
    for too few documents.
    """
    settings, out = settings or QualitySettings(), out.resolve()
    report = on_progress or (lambda step, done, total: None)
    require(bool(good), "--good", dict(good), "at least one source")
    require(bool(raw), "--raw", dict(raw), "at least one source")
    require(not set(good) & set(raw), "--raw", sorted(set(good) & set(raw)), "names that no good source has")
    require_replaceable(out, "quality_version")
    sources = {**good, **raw}
    splits = [split for name, path in sources.items() for split in plan_splits(name, path, settings.split_bytes)]
    labels = {name: name in good for name in sources}
    inputs = {
        "version": VERSION,
        "labels": labels,
        "splits": [asdict(split) for split in splits],
        "settings": to_dict(settings),
        "base": _base_hashes(settings),
    }
    if intact(out, inputs):
        return out
    work = work_folder(out, "training", content_hash(inputs))
    with session():
        packed = [asdict(split) for split in splits]
        gather = partial(_gather, settings=settings, work=work)
        counts = run_splits(gather, packed, lambda done: report("reading", done, len(splits)))
        report("training", 0, 1)
        passages = load_passages(splits, labels, work, settings)
        made = work / "made"
        shutil.rmtree(made, ignore_errors=True)
        model, encoder = fit(passages, settings), None
        if settings.encoder is not None:
            encoder = _train_encoder(passages, settings, work, made / ENCODER, progress)
            model = calibrate_encoder(model, encoder, passages, settings)
    model.save(made)
    report("measuring", 0, 1)
    facts = _facts(model, encoder, passages, settings, labels, _by_source(splits, counts))
    if encoder is not None:
        facts["max_logit_difference"] = _max_difference(encoder, made / ENCODER, passages)
    write_card(made, facts)
    for path in made.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files private to their owner; artifacts are shared
    commit(made, inputs=content_hash(inputs), quality_version=VERSION, provenance=provenance())
    publish(made, out)
    shutil.rmtree(work, ignore_errors=True)
    return out


def _gather(packed: dict[str, Any], settings: QualitySettings, work: Path) -> dict[str, Any]:
    return gather_split(Split.unpack(packed), settings, work)


def _base_hashes(settings: QualitySettings) -> dict[str, str]:
    """What a local base holds; a hub's is told by its revision, which is among the settings."""
    base = settings.encoder and settings.encoder.base
    files = sorted(Path(base).iterdir()) if base and Path(base).is_dir() else []
    return {path.name: file_hash(path) for path in files if path.is_file()}


def _train_encoder(
    passages: Passages, settings: QualitySettings, work: Path, folder: Path, progress: TrainingProgress | None
) -> Encoder:
    """Train the encoder as a task of the one loop, into a Hugging Face folder with its int8 graph."""
    from transformers.utils.logging import disable_progress_bar

    from danube_ray.posttrain.quality import EncoderTask, export, write_passages
    from danube_ray.runtime import training

    assert settings.encoder is not None
    disable_progress_bar()  # a bar for each file of weights, over the caller's own
    chosen, base, data = settings.encoder, work / "base", work / "encoder-passages.parquet"
    examples = for_encoder(passages.of("training"), chosen.max_passages)
    if not (base / "config.json").is_file():
        write_base(chosen, examples.texts, base, settings.seed)
    tokenizer, _ = load_tokenizer(base)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch_fast(examples.texts)]
    write_passages(data, tokens, examples.good)
    num_steps = -(-round(chosen.epochs * len(examples)) // chosen.batch_size)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    config = EncoderConfig(
        name=ENCODER,
        base=str(base),
        data=str(data),
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        micro_batch_size=chosen.batch_size if on_gpu else CPU_MICRO_BATCH,
        optimizer=OptimizerConfig(
            learning_rate=chosen.learning_rate, min_learning_rate=0.0, warmup_steps=num_steps // 10, weight_decay=0.01
        ),
        loop=LoopConfig(
            cpus_per_worker=chosen.cpus_per_worker,
            precision="bf16" if on_gpu else "fp32",
            deterministic=not on_gpu,
            checkpoint_every_steps=200,
            validate_every_steps=num_steps,
            seed=settings.seed,
        ),
        output_dir=str(work / "runs"),
    )
    checkpoint = training.train(lambda: EncoderTask(config), config, config.optimizer, config.loop, progress)
    export(checkpoint, base, folder)
    write_graph(folder)
    return Encoder.of_folder(folder)


def _facts(
    model: QualityModel,
    encoder: Encoder | None,
    passages: Passages,
    settings: QualitySettings,
    labels: dict[str, bool],
    counts: dict[str, Counter[str]],
) -> dict[str, Any]:
    """What card.json holds."""
    gain = dict(zip(model.trees.feature_name(), model.trees.feature_importance("gain").tolist(), strict=True))
    largest = sorted(gain, key=lambda name: -gain[name])[:8]
    data = {}
    for number, name in enumerate(passages.sources):
        rows = passages.select(passages.source == number)
        parts = {part: int((rows.part == part).sum()) for part in ("training", "calibration", "held-out")}
        counted = {**counts[name], "passages": len(rows), "passes": float(rows.passes.mean())}
        data[name] = {**counted, **parts}
    return {
        "sources": labels,
        **measure(model, encoder, passages, settings),
        "threshold": model.threshold,
        "band": asdict(model.band),
        "control": asdict(control(passages, settings)),
        "data": data,
        "features": list(FEATURES),
        "gain": {name: gain[name] / max(sum(gain.values()), 1e-9) for name in largest},
        "seed": settings.seed,
        "settings": to_dict(settings),
    }


def _max_difference(encoder: Encoder, folder: Path, passages: Passages) -> float:
    """The largest difference between int8 and float32 log-odds on held-out passages, with the trained weights."""
    texts = passages.of("held-out").texts[:COMPARED]
    plain = Encoder(encoder.tokenizer, TorchRunner(folder, "cpu"), encoder.max_tokens)
    return float(np.abs(encoder.log_odds(texts) - plain.log_odds(texts)).max())


def _by_source(splits: Sequence[Split], counts: Sequence[dict[str, int]]) -> dict[str, Counter[str]]:
    total: dict[str, Counter[str]] = {}
    for split, row in zip(splits, counts, strict=True):
        total.setdefault(split.source, Counter()).update(row)
    return total


class Scorer:
    """An actor that holds the encoder and scores the splits that come to it."""

    def __init__(self, folder: Path, work: Path, device: str) -> None:
        self.work = work
        self.model, self.encoder = QualityModel.load(folder), Encoder.load(folder, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return run_split(row, self.score)

    def score(self, packed: dict[str, Any]) -> dict[str, int]:
        return score_split(Split.unpack(packed), self.work, self.model, self.encoder)


def score_splits(
    splits: Sequence[Split],
    work: Path,
    folder: Path,
    *,
    on_progress: Progress | None = None,
) -> int:
    """Score what the trees were unsure of in every judged split, on a pool of actors; how many documents that was.

    Each actor has a GPU where the cluster has one, a CPU else. A split is one actor's: its file is the same whoever
    scores it, on machines of one kind. What is finished is verified and not done again.
    """
    report = on_progress or (lambda done, total: None)
    counts = [verified(work, "scored", split) for split in splits]
    done = [found["scored"] for found in counts if found is not None]
    todo = [asdict(split) for split, found in zip(splits, counts, strict=True) if found is None]
    report(len(done), len(splits))
    if not todo:
        return sum(done)
    with session():
        gpus = int(ray.cluster_resources().get("GPU", 0))
        most = gpus or max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)  # one is left for reading and the driver
        on_actors: dict[str, Any] = {
            "fn_constructor_args": (folder.resolve(), work, "cuda" if gpus else "cpu"),
            "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(todo))),
            "num_gpus" if gpus else "num_cpus": 1,
        }
        scored = map_splits(Scorer, todo, lambda number: report(len(done) + number, len(splits)), **on_actors)
    return sum(done) + sum(row["scored"] for row in scored)
