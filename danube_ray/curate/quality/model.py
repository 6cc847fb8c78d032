"""The trained models as a folder, and the gradient-boosted one at work.

quality.json          features, calibrations, the uncertain band, threshold
linear.safetensors    the n-gram weights        gbm.txt     LightGBM's own text
encoder/              a Hugging Face folder and its int8 ONNX graph, where one was trained
card.md, card.json, calibration.png, manifest.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from safetensors.numpy import load_file, save_file

from danube_ray.artifacts import MANIFEST, ArtifactError, content_hash, damage, read_json, read_manifest, write_json
from danube_ray.curate.quality.calibration import NOWHERE, Band, Platt
from danube_ray.curate.quality.gbm import FEATURES, as_table
from danube_ray.curate.quality.linear import LinearModel, buckets
from danube_ray.curate.words import Words

if TYPE_CHECKING:
    from lightgbm import Booster

VERSION = 1  # raise it when the same files would give other scores
FACTS, LINEAR, TREES, ENCODER = "quality.json", "linear.safetensors", "gbm.txt", "encoder"
CARD = ("card.md", "card.json", "calibration.png")


@dataclass(frozen=True, eq=False)
class QualityModel:
    """The gradient-boosted model over rules' signals and n-grams, calibrated: `score` gives probabilities of good.

    `band` is where it is unsure; with an encoder, texts in it are scored again (`Encoder`). `encoder` is its
    calibration. Where `sha256` is equal, so are the scores of the same texts.
    """

    linear: LinearModel
    trees: Booster
    platt: Platt
    band: Band
    threshold: float
    encoder: Platt | None = None
    names: tuple[str, ...] = FEATURES
    sha256: str = ""

    @property
    def has_encoder(self) -> bool:
        return self.encoder is not None and self.band != NOWHERE

    @cached_property
    def num_buckets(self) -> int:
        return len(self.linear.weights)

    def score(self, rows: Sequence[tuple[Words, Mapping[str, float]]]) -> np.ndarray:
        """(N,) float64 probabilities that texts are good, from their words and their rules' signals.

        Best called with some hundred texts at once. A signal that is missing counts as unknown.
        """
        texts = [buckets(words, self.num_buckets) for words, _ in rows]
        return self.platt(self.log_odds(texts, as_table([signals for _, signals in rows], self.names)))

    def log_odds(self, texts: Sequence[np.ndarray], signals: np.ndarray) -> np.ndarray:
        """(N,) float64, not calibrated, from texts' `linear.buckets` and signals (N, F)."""
        if not len(texts):
            return np.empty(0)
        linear_scores = np.array([self.linear.score(text) for text in texts])
        rows = np.column_stack((signals, linear_scores))
        return np.asarray(self.trees.predict(rows, raw_score=True, num_threads=1), np.float64)

    def uncertain(self, scores: np.ndarray) -> np.ndarray:
        """(N,) bool: which of these scores lie in the band that an encoder is asked about."""
        return self.band.holds(scores)

    def save(self, folder: Path) -> None:
        """Write all but the encoder and the card; whoever calls commits the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weights": self.linear.weights}, folder / LINEAR)
        (folder / TREES).write_text(self.trees.model_to_string())
        facts = {
            "version": VERSION,
            "features": list(self.names),
            "linear_bias": self.linear.bias,
            "calibration": asdict(self.platt),
            "band": asdict(self.band),
            "threshold": self.threshold,
            "encoder_calibration": asdict(self.encoder) if self.encoder else None,
        }
        write_json(folder / FACTS, facts)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises `ArtifactError` for a folder that `danube quality train` did not finish, or that was changed since."""
        from lightgbm import Booster

        if (wrong := damage(folder)) is not None:
            raise ArtifactError(f"{wrong}: train a quality model with `danube quality train`")
        facts = read_facts(folder)
        encoder = facts["encoder_calibration"]
        return cls(
            linear=LinearModel(load_file(folder / LINEAR)["weights"], facts["linear_bias"]),
            trees=Booster(model_str=(folder / TREES).read_text()),
            platt=Platt(**facts["calibration"]),
            band=Band(**facts["band"]),
            threshold=facts["threshold"],
            encoder=Platt(**encoder) if encoder else None,
            names=tuple(facts["features"]),
            sha256=_identity(folder),
        )


def read_facts(folder: Path) -> dict[str, Any]:
    facts = read_json(folder / FACTS)
    if facts.get("version") != VERSION:
        raise ArtifactError(f"{folder} is of version {facts.get('version')}, this is {VERSION}: train the model again")
    return facts


def _identity(folder: Path) -> str:
    """What the scores depend on: every file but the card's."""
    files = read_manifest(folder)["files"]
    return content_hash({name: file["sha256"] for name, file in files.items() if name not in (*CARD, MANIFEST)})
