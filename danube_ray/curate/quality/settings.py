"""What `danube quality train` does: every setting of it beside its sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from danube_ray.config import WEB_RULES, Extraction, HeuristicRules, require, require_positive

COMMIT_HASH_CHARS = 40


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """The encoder that judges what the gradient-boosted model leaves open.

    base: a local Hugging Face folder, or a hub id with `revision`, the commit's hash: what a branch names today may be
        another model tomorrow. None: a BERT of the shape below is trained from nothing, its WordPiece vocabulary too.
    max_tokens: of each text, from its start.
    max_passages: at most so many of each class are trained on; the larger class is cut to 4 times the smaller one.
    cpus_per_worker: the CPUs that training takes where it has no GPU.
    """

    base: str | None = None
    revision: str | None = None
    max_tokens: int = 512
    vocab_size: int = 8_000
    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float = 3e-4
    max_passages: int = 2_000
    cpus_per_worker: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "max_tokens", "vocab_size", "num_layers", "hidden_size", "num_heads", "epochs")
        require_positive(self, "batch_size", "learning_rate", "max_passages", "cpus_per_worker")
        if self.base is not None and not Path(self.base).is_dir():
            pinned = self.revision is not None and is_commit_hash(self.revision)
            remedy = "name the commit of the hub's repository, or a local folder as base"
            allowed = f"a commit's {COMMIT_HASH_CHARS} hex digits with a hub id as base"
            require(pinned, "EncoderSettings.revision", self.revision, allowed, remedy)


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """How documents become labelled passages, and how both models are trained on them.

    languages, min_language_score, extraction, split_bytes, max_document_bytes: as in `CurationConfig`, so that the
        models see what curation will show them.
    rules: those that curation will use; they part nothing here, but the card says how well the models do on what
        passes them.
    passage_chars, passages_per_document: long documents are cut at line ends, and so many passages are drawn of each,
        that a book weighs as some pages do.
    passages_per_source: at most so many are drawn.
    calibration_share, held_out_share: of the documents, left out of training: for the calibration and the uncertain
        band, and for the figures on the card.
    num_buckets: of the hashed word 1- and 2-grams.
    encoder: None trains none.
    encoder_share: the part of the raw text that the encoder judges: where the other model is least sure.
    always_ask_encoder: also where it is no better there, on the calibration part, than the other model.
    threshold: the quality at which the card states precision and recall.
    """

    languages: tuple[str, ...] = ("en",)
    min_language_score: float = 0.65
    extraction: Extraction = "trafilatura"
    rules: HeuristicRules = WEB_RULES
    passage_chars: int = 4_000
    passages_per_document: int = 16
    passages_per_source: int = 10_000
    calibration_share: float = 0.2
    held_out_share: float = 0.2
    num_buckets: int = 2**20
    num_trees: int = 300
    num_leaves: int = 31
    encoder: EncoderSettings | None = field(default_factory=EncoderSettings)
    encoder_share: float = 0.2
    always_ask_encoder: bool = False
    threshold: float = 0.5
    control_labelings: int = 3
    split_bytes: int = 8 * 2**20
    max_document_bytes: int = 10 * 2**20
    seed: int = 1234

    def __post_init__(self) -> None:
        require_positive(self, "passage_chars", "passages_per_document", "passages_per_source", "num_trees")
        require_positive(self, "split_bytes", "max_document_bytes", "control_labelings")
        for name in ("min_language_score", "encoder_share", "threshold"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"QualitySettings.{name}", value, "between 0 and 1")
        for name in ("calibration_share", "held_out_share"):
            value = getattr(self, name)
            require(0 < value <= 0.4, f"QualitySettings.{name}", value, "above 0, at most 0.4")
        require(self.num_leaves >= 2, "QualitySettings.num_leaves", self.num_leaves, "2 or more")
        is_power = self.num_buckets > 1 and self.num_buckets & (self.num_buckets - 1) == 0
        require(is_power, "QualitySettings.num_buckets", self.num_buckets, "a power of 2")


def is_commit_hash(revision: str) -> bool:
    return len(revision) == COMMIT_HASH_CHARS and all(digit in "0123456789abcdef" for digit in revision)


Portion = Literal["training", "calibration", "held-out"]
