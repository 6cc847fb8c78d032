"""What levels are compared on: the options that say it, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danube_ray.artifacts import read_manifest
from danube_ray.cli.console import named_paths
from danube_ray.config import ModelConfig, require

if TYPE_CHECKING:
    import numpy as np

    from danube_ray.runtime.measuring import Material

CHARACTERS_PER_TOKEN = 16  # more than any tokenizer's text has on average
DEFAULT_CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the quality of a level is measured, against the float model on the same text.

    Args:
        tokens: a tokens folder; levels are compared on its held-out part.
        text: a text file to compare levels on instead.
        num_tokens: tokens to compare on; the float model's logits take 4 bytes for each and each piece of the
            vocabulary, in memory or on disk.
        context: tokens a window (default 512), and of --estimate's cache (default: all that the model has).
        tasks: NAME=FILE each, questions as `danube evaluate` has them; every level answers, and the float model.
        limit: documents a task.
        long_context: compare by position up to the longest usable context, and find hidden words in long prompts.
    """

    tokens: Path | None = None
    text: Path | None = None
    num_tokens: int = 16_384
    context: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    long_context: bool = False

    def __post_init__(self) -> None:
        require(self.tokens is None or self.text is None, "--tokens and --text", "both", "one of them")
        require(self.num_tokens > 1, "--num-tokens", self.num_tokens, "at least 2")
        require(self.context is None or self.context > 1, "--context", self.context, "at least 2")
        require(self.limit is None or self.limit > 0, "--limit", self.limit, "at least 1")
        there = not self.long_context or self.place is not None
        require(there, "--long-context", True, "used with --tokens or --text")

    @property
    def place(self) -> Path | None:
        """The text, as file or as tokens; None where quality is not measured."""
        return self.tokens or self.text

    def material(self, folder: Path, config: ModelConfig) -> Material:
        """What the levels of a model are measured on; all that is wrong with it is said here, before work starts."""
        from danube_ray.data.tokenizer import Tokenizer
        from danube_ray.evaluate.harness import multiple_choice_task
        from danube_ray.quantize import long_context as far
        from danube_ray.quantize.measure import passages
        from danube_ray.runtime.measuring import Material

        longest = config.usable_context
        context = self.context or min(DEFAULT_CONTEXT, longest)
        tasks = [multiple_choice_task(*pair) for pair in named_paths(self.tasks).items()] if self.tasks else []
        if tasks:
            Tokenizer.load(folder)  # levels answer through it
        if self.place is None:
            return Material(tasks=tasks, limit=self.limit)
        check = None
        if self.long_context:
            enough = max(self.num_tokens, far.MOST_WINDOWS * longest)
            check = far.long_context(read_ids(self.place, folder, enough), longest, Tokenizer.load(folder))
        texts = passages(read_ids(self.place, folder, self.num_tokens), context)
        return Material(texts, check, tasks, self.limit)


def read_ids(place: Path, folder: Path, num_tokens: int, *, held_out: bool = True) -> np.ndarray:
    """Up to `num_tokens` ids, by the tokenizer of the model in `folder`, of a text file's beginning, or of a tokens
    folder's held-out or training part."""
    import numpy as np

    from danube_ray.data.shards import held_out_tokens, open_sources
    from danube_ray.data.tokenizer import Tokenizer

    require(place.exists(), "text or tokens", str(place), "a file or folder that exists")
    if place.is_file():
        with place.open(encoding="utf-8", errors="replace") as file:
            text = file.read(CHARACTERS_PER_TOKEN * num_tokens)
        return np.array(encode(text, folder)[:num_tokens], np.int32)
    tokenizer = Tokenizer.load(folder)
    made_with, remedy = read_manifest(place).get("tokenizer_sha256"), "write the tokens with the model's own tokenizer"
    require(
        made_with == tokenizer.sha256, f"tokenizer of {place}", made_with, f"the model's, {tokenizer.sha256}", remedy
    )
    if held_out:
        return held_out_tokens(place, num_tokens)
    stores = [store for buckets in open_sources(place).values() for store in buckets.values()]
    each = num_tokens // len(stores)
    return np.concatenate([store.read(0, min(store.num_tokens, each)) for store in stores])


def encode(text: str, folder: Path) -> list[int]:
    """Ids of a text by a model's tokenizer: a sentencepiece model, or what `tokenizers` reads, as Llama 3 has it."""
    from danube_ray.data.tokenizer import MODEL_FILE, Tokenizer

    if (folder / "tokenizer.json").is_file() and not (folder / MODEL_FILE).is_file():
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return Tokenizer.load(folder).encode(text)
