"""How a curation reads, judges and deduplicates: every setting beside its sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from danube_ray.config.check import require
from danube_ray.config.rules import RULE_SETS, WEB_RULES, HeuristicRules

Extraction = Literal["trafilatura", "resiliparse"]
Masked = Literal["email", "ip", "phone"]


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """How documents are read, judged and parted from their duplicates."""

    # What a document must be like, where `rule_sets` names no set of rules for its source.
    rules: HeuristicRules = WEB_RULES
    # By source: web, c4, prose (books, wiki, papers) or none.
    rule_sets: dict[str, str] = field(default_factory=dict)
    # How text is taken out of HTML: trafilatura is more precise, resiliparse many times faster.
    extraction: Extraction = "trafilatura"
    # ISO 639-1 codes of what is kept; none: every language is.
    languages: tuple[str, ...] = ("en",)
    # The least probability with which that language is found.
    min_language_score: float = 0.65
    # What is replaced in the text: e-mail addresses, public IP addresses, phone numbers.
    mask: tuple[Masked, ...] = ("email", "ip")
    # Above this share of lines that look like source code a document is dropped; 1: none is.
    max_code_share: float = 0.5
    # Files of hosts or addresses, a line each, whose documents are dropped.
    blocked_urls: tuple[Path, ...] = ()
    # Files of words or phrases, a line each: documents that hold one are dropped.
    blocked_words: tuple[Path, ...] = ()
    # What `danube quality train` left: its probability that a text is good becomes `quality`.
    quality_model: Path | None = None
    # Documents below it are dropped; a mixture's stages can set minimums of their own.
    min_quality: float = 0.0
    # Whether near-duplicates (MinHash) are dropped beside exact ones.
    near_duplicates: bool = True
    # The least similarity, in word 5-grams, of a near-duplicate to the document kept in its place.
    min_jaccard: float = 0.75
    # Evaluation sets: documents that hold their items are dropped.
    benchmarks: dict[str, Path] = field(default_factory=dict)
    # About how much one task reads.
    split_bytes: int = 8 * 2**20
    # Longer documents are quarantined.
    max_document_bytes: int = 10 * 2**20
    # Above this share of unreadable records in a source the run fails.
    max_quarantine_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("min_language_score", "max_code_share", "min_quality", "min_jaccard", "max_quarantine_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"CurationConfig.{name}", value, "between 0 and 1")
        for name in ("split_bytes", "max_document_bytes"):
            require(getattr(self, name) > 0, f"CurationConfig.{name}", getattr(self, name), "greater than 0")
        needs_model = "train one with `danube quality train`, and name it in quality_model"
        require(
            self.min_quality == 0 or self.quality_model is not None,
            "CurationConfig.min_quality",
            self.min_quality,
            "0 without a quality model",
            needs_model,
        )
        require(
            all(name in RULE_SETS for name in self.rule_sets.values()),
            "CurationConfig.rule_sets",
            self.rule_sets,
            f"by source one of {', '.join(RULE_SETS)}",
        )

    def rules_of(self, source: str) -> HeuristicRules:
        return RULE_SETS[self.rule_sets[source]] if source in self.rule_sets else self.rules
