"""`danube quality`: what its options mean, and the card in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from danube_ray.artifacts import ArtifactError
from danube_ray.cli.quality import quality as run_verb
from danube_ray.config import ConfigError
from danube_ray.curate.quality import QualitySettings
from danube_ray.runtime import quality


@pytest.fixture
def trained_with(monkeypatch, tmp_path) -> dict:
    """What a training was asked for; in its place a card is written."""
    asked = {}

    def train(good, raw, out: Path, settings: QualitySettings, on_progress) -> Path:
        asked.update(good=good, raw=raw, out=out, settings=settings)
        out.mkdir(parents=True)
        (out / "card.json").write_text("{}")
        (out / "card.md").write_text("# Quality models\n\nheld-out AUC 0.9")
        return out

    monkeypatch.setattr(quality, "train", train)
    monkeypatch.chdir(tmp_path)
    for name in ("wiki", "books", "web"):
        (tmp_path / name).mkdir()
    return asked


def run(*arguments: str) -> None:
    run_verb(list(arguments))


def test_sources_are_named_by_class_and_the_card_is_shown(trained_with, capsys):
    run("train", "--good", "wiki=wiki", "books=books", "--raw", "web=web", "--encoder-share", "0.1")
    assert trained_with["good"] == {"wiki": "wiki", "books": "books"}
    assert trained_with["raw"] == {"web": "web"}
    assert trained_with["out"] == Path("data/quality")
    assert trained_with["settings"] == QualitySettings(encoder_share=0.1)
    assert "held-out AUC 0.9" in capsys.readouterr().out
    run("show", "data/quality")
    assert "held-out AUC 0.9" in capsys.readouterr().out


def test_an_encoder_is_left_out_or_pinned(trained_with):
    run("train", "--good", "wiki=wiki", "--raw", "web=web", "--without-encoder")
    assert trained_with["settings"].encoder is None
    pinned = ["--encoder", "owner/name", "--revision", "0123456789" * 4, "--out", "other"]
    run("train", "--good", "wiki=wiki", "--raw", "web=web", *pinned)
    assert trained_with["settings"].encoder.base == "owner/name"
    with pytest.raises(ConfigError, match="revision"):
        run("train", "--good", "wiki=wiki", "--raw", "web=web", "--encoder", "owner/name")


def test_mistakes_are_named(trained_with):
    with pytest.raises(ConfigError, match="'nothing=nothing', allowed is a path that exists"):
        run("train", "--good", "nothing=nothing", "--raw", "web=web")
    with pytest.raises(ArtifactError, match=r"card.json does not exist"):
        run("show", "web")
