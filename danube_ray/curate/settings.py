"""What curation does, as `danube curate` takes it: every setting of a run beside its sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from danube_ray.config import require
from danube_ray.curate.heuristics import WEB_RULES, HeuristicRules

Extraction = Literal["trafilatura", "resiliparse"]
Masked = Literal["email", "ip", "phone"]


@dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """How documents are read, judged and parted from their duplicates.

    rules: what a document must be like, where `rule_sets` names no other set for its source.
    rule_sets: by source, the name of a set: web, c4, prose, none.
    extraction: trafilatura is the more precise, resiliparse many times faster.
    languages: ISO 639-1 codes that are kept, found with a probability of `min_language_score`; none: all are.
    mask: what is replaced in the text: e-mail addresses, public IP addresses, phone numbers.
    max_code_share: above this share of lines that look like source code a document is dropped; 1: none is.
    blocked_urls, blocked_words: files of hosts or addresses, and of words, a line each, whose documents are dropped.
    quality_model: the folder of `danube quality train`; its probability that a text is good becomes `quality`.
    min_quality: documents below it are dropped; a mixture's stages can set a minimum of their own.
    near_duplicates: whether near-duplicates (MinHash) are dropped beside exact ones; `min_jaccard` is the least
        similarity, in word 5-grams, of a document to the one kept in its place.
    benchmarks: evaluation files by name; documents that hold their items are dropped.
    split_bytes: about how much one task reads.
    max_document_bytes: longer documents are quarantined.
    max_quarantine_share: above this share of a source the run fails.
    """

    rules: HeuristicRules = WEB_RULES
    rule_sets: dict[str, str] = field(default_factory=dict)
    extraction: Extraction = "trafilatura"
    languages: tuple[str, ...] = ("en",)
    min_language_score: float = 0.65
    mask: tuple[Masked, ...] = ("email", "ip")
    max_code_share: float = 0.5
    blocked_urls: tuple[Path, ...] = ()
    blocked_words: tuple[Path, ...] = ()
    quality_model: Path | None = None
    min_quality: float = 0.0
    near_duplicates: bool = True
    min_jaccard: float = 0.75
    benchmarks: dict[str, Path] = field(default_factory=dict)
    split_bytes: int = 8 * 2**20
    max_document_bytes: int = 10 * 2**20
    max_quarantine_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("min_language_score", "max_code_share", "min_quality", "min_jaccard", "max_quarantine_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"CurationSettings.{name}", value, "between 0 and 1")
        for name in ("split_bytes", "max_document_bytes"):
            require(getattr(self, name) > 0, f"CurationSettings.{name}", getattr(self, name), "greater than 0")
        needs_model = "train one with `danube quality train`, and name it in quality_model"
        require(
            self.min_quality == 0 or self.quality_model is not None,
            "CurationSettings.min_quality",
            self.min_quality,
            "0 without a quality model",
            needs_model,
        )
