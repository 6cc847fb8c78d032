"""`danube quality VERB`: train the models that tell good text from raw, and show what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tyro

from danube_ray.cli.console import Positional, console, named_places


def train(
    good: tuple[str, ...],
    raw: tuple[str, ...],
    out: Path = Path("data/quality"),
    languages: tuple[str, ...] = ("en",),
    encoder: str | None = None,
    revision: str | None = None,
    without_encoder: bool = False,
    encoder_share: float = 0.2,
    always_ask_encoder: bool = False,
) -> None:
    """Train models that tell good text from raw, for `danube curate --quality-model`, with a card of what they know.

    Args:
        good: NAME=PATH each, files and folders of text to be like; a sample of some hundred MB is enough.
        raw: NAME=PATH each, text as it comes, such as web pages.
        out: where the models and their card go.
        languages: ISO 639-1 codes of the documents that are trained on; none: all.
        encoder: a local folder of a BERT, or a hub id with --revision; left out, a small one is trained from nothing.
        revision: the commit of the hub's repository.
        without_encoder: train the gradient-boosted model alone.
        encoder_share: the part of raw text that the encoder judges, where the other model is least sure.
        always_ask_encoder: ask it there even if it turns out no better than the other model.
    """
    from rich.progress import Progress as Bars

    from danube_ray.curate.quality.settings import EncoderSettings, QualitySettings
    from danube_ray.runtime import quality

    chosen = None if without_encoder else EncoderSettings(base=encoder, revision=revision)
    settings = QualitySettings(
        languages=languages,
        encoder=chosen,
        encoder_share=encoder_share,
        always_ask_encoder=always_ask_encoder,
    )
    good_text, raw_text = named_places(good), named_places(raw)
    with Bars(console=console, transient=True) as bars:
        bar = bars.add_task("reading", total=None)
        quality.train(
            good_text,
            raw_text,
            out,
            settings,
            on_progress=lambda step, done, total: bars.update(bar, description=step, completed=done, total=total),
        )
    show(out)


def show(folder: Positional[Path] = Path("data/quality")) -> None:
    """Print the card of trained models.

    Args:
        folder: the models' folder.
    """
    from rich.markdown import Markdown

    from danube_ray.curate.quality.card import read_card

    console.print(Markdown(read_card(folder)))
    console.print(f"models and card in [bold]{folder}[/bold]")


VERBS: dict[str, Callable[..., None]] = {"train": train, "show": show}


def quality(arguments: list[str]) -> None:
    """Train models that tell good text from raw, or show their card."""
    tyro.extras.subcommand_cli_from_dict(VERBS, args=arguments, prog="danube quality", description=quality.__doc__)
