"""The page: what each section says, put through one template that escapes every value."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from danube_ray.artifacts import write_atomically
from danube_ray.report import units
from danube_ray.report.figures import loss_by_step, loss_by_tokens
from danube_ray.report.machine import machine_by_tokens
from danube_ray.report.quantization import found_at, quantization
from danube_ray.report.run import Row, RunArtifacts, Training, read_run
from danube_ray.report.training import events, status, written

HERE = Path(__file__).parent
NUM_COLORS = 10
RENEW_S = 30  # how often a browser reads the page of an unfinished run again
POSTTRAINING_TITLES = {"sft": "Supervised fine-tuning", "dpo": "Direct preference optimisation"}


def write_report(run_folder: Path, live: bool = False) -> Path:
    """Write `report.html` into a run folder from the artifacts in it, and return its path.

    The page is one file without any request: it opens from disk, light or dark, on a desktop or a phone. What the run
    has not made is left out. While a run is unfinished, or `live`, the page renews itself in the browser, so whoever
    writes it again updates it. Raises `ArtifactError` when the folder holds nothing to report or a file in it is torn.
    """
    return render("page.html", page(read_run(run_folder), live), run_folder / "report.html")


def render(template: str, values: dict[str, Any], path: Path) -> Path:
    """Write one of this folder's templates, filled in, to `path`; every value is escaped."""
    files = {"style": (HERE / "page.css").read_text(), "script": (HERE / "page.js").read_text()}
    write_atomically(path, environment().get_template(template).render(values, **files))
    return path


@functools.cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "short_count", "size", "duration", "decimal", "measured", "percent"):
        made.filters[name] = getattr(units, name)
    made.globals["found_at"] = found_at
    return made


def page(run: RunArtifacts, live: bool = False) -> dict[str, Any]:
    """Everything that the template shows; a section that is empty or None is left out."""
    colors = {source: f"var(--c{index % NUM_COLORS})" for index, source in enumerate(run.sources)}
    entropy = run.perplexity.get("unigram_entropy")
    training = run.pretraining
    shown = training or next(iter(run.posttraining.values()), None)
    return {
        "run": run,
        "colors": colors,
        "summary": summary(run),
        "headline": headline(run),
        "status": status(shown, live) if shown else None,
        "renew_s": RENEW_S,
        "steps": steps(run),
        "loss_figure": loss_by_tokens(training, colors, entropy) if training else None,
        "machine_figure": machine_by_tokens(training) if training else None,
        "events": events(shown) if shown else {},
        "written": written(shown) if shown else {},
        "mixture": mixture(training, run.mixture) if training else [],
        "curation": curation(run),
        "posttraining": [
            (title, loss_by_step(part, title, colors), part)
            for title, part in ((POSTTRAINING_TITLES.get(name, name), part) for name, part in run.posttraining.items())
        ],
        "results": [result(row) for row in run.results],
        "quantization": quantization(run.quantization),
        "search": search(run.trials),
        "provenance": run.provenance,
        "configs": {name: json.dumps(config, indent=2) for name, config in run.configs.items()},
    }


def summary(run: RunArtifacts) -> str:
    """One sentence on what the run is."""
    if not run.pretraining:
        names = [POSTTRAINING_TITLES.get(name, "Training") for name in run.posttraining]
        if not names and run.quantization:
            return f"What {len(run.quantization)} quantized levels of a model cost, and what they save."
        if not names and run.trials:
            return f"A search of {len(run.trials)} trials."
        return f"{' and '.join(names)}." if names else ""
    parameters = run.pretraining.num_parameters
    model = f"A model of {units.count(parameters)} parameters" if parameters else "A model"
    stages, sources = len(run.pretraining.stages), len(run.pretraining.sources)
    tokens = f"{units.short_count(run.pretraining.train[-1]['tokens'])} tokens"
    if run.pretraining.unfinished:
        planned = sum(stage["tokens"] for stage in run.pretraining.stages)
        tokens = f"{tokens} so far of {units.short_count(planned)},"
    origin = f"{sources} source{'s' * (sources != 1)} in {stages} stage{'s' * (stages != 1)}"
    return f"{model}, trained on {tokens} of {origin}."


def headline(run: RunArtifacts) -> list[tuple[str, str, str]]:
    """The few numbers that a reader looks for first: label, value, and what stands under it."""
    tiles = []
    training = run.pretraining or next(iter(run.posttraining.values()), None)
    if run.perplexity:
        loss, entropy = run.perplexity["validation_loss"], run.perplexity["unigram_entropy"]
        tiles.append(("validation loss", f"{loss:.3f}", "nats a token"))
        tiles.append(("below unigram", units.percent(run.perplexity["improvement"]), f"entropy {entropy:.3f} nats"))
    elif training:
        validated = training.validation[-1] if training.validation else None
        name, last = ("validation loss", validated) if validated else ("training loss", training.train[-1])
        tiles.append((name, f"{last['loss']:.3f}", f"after step {last['step']:,}"))
    if training:
        speeds = sorted(row["tokens_per_s"] for row in training.train if row.get("tokens_per_s"))
        tiles.append(
            ("tokens trained", units.count(training.train[-1]["tokens"]), f"{training.train[-1]['step']:,} steps")
        )
        if speeds:
            tiles.append(("speed", f"{units.count(speeds[len(speeds) // 2])}/s", "tokens, median of steps"))
        if used := sorted(row["mfu"] for row in training.train if row.get("mfu")):
            tiles.append(("utilisation", units.percent(used[len(used) // 2]), "model FLOP of the bf16 peak"))
    losses = [trial["loss"] for trial in run.trials if finite(trial["loss"])]
    if losses and not tiles:  # the folder of a search alone
        tiles.append(("best validation loss", units.decimal(min(losses)), "nats a token"))
    if run.steps:
        total_s = sum(step.get("seconds") or 0 for step in run.steps)
        skipped = sum(bool(step.get("skipped")) for step in run.steps)
        note = f"{len(run.steps)} steps" + (f", {skipped} done before" if skipped else "")
        tiles.append(("time", units.duration(total_s), note))
    return tiles


def steps(run: RunArtifacts) -> list[dict[str, Any]]:
    """The pipeline's steps: share of the longest one's time, facts in words, and a link where it leads somewhere."""
    longest_s = max((step.get("seconds") or 0 for step in run.steps), default=0) or 1
    return [
        {
            "title": step.get("title") or step["name"],
            "seconds": step.get("seconds"),
            "skipped": bool(step.get("skipped")),
            "share": (step.get("seconds") or 0) / longest_s,
            "facts": [units.fact(name, value) for name, value in (step.get("facts") or {}).items()],
            **place(run.folder, step.get("path")),
        }
        for step in run.steps
    ]


def place(folder: Path, stated: str | None) -> dict[str, str]:
    """Where a step's result lies, as text, and as a link relative to the report where it is inside the run folder."""
    if not stated:
        return {"path": "", "link": ""}
    base = folder.resolve()
    inside = next((p for p in (Path(stated).resolve(), base / stated) if p.is_relative_to(base) and p.exists()), None)
    if inside is None:
        return {"path": stated, "link": ""}
    relative = inside.relative_to(base).as_posix()
    return {"path": relative, "link": quote(relative + ("/" if inside.is_dir() else ""))}


def mixture(training: Training, seen: dict[str, dict[str, Row]]) -> list[dict[str, Any]]:
    """Each stage's settings and, by source, its share, and the tokens and epochs that it came to where known."""
    stages = []
    for stage in training.stages:
        total = sum(stage["shares"].values())
        came_to = seen.get(stage["name"], {})
        parts = {
            source: {"share": share / total, **came_to.get(source, {})} for source, share in stage["shares"].items()
        }
        stages.append({**stage, "parts": parts})
    return stages


def curation(run: RunArtifacts) -> dict[str, Any]:
    """Read, kept, dropped and quarantined documents by source, the reasons, most frequent first, and a page of more."""
    counts = run.curation
    if not counts:
        return {}
    its_own = "documents/report.html"
    names = ("read", "kept", "dropped", "quarantined")
    reasons: dict[str, dict[str, int]] = {}
    for source, row in counts.items():
        for reason, number in {**row.get("dropped_by", {}), **row.get("quarantined_by", {})}.items():
            by_source = reasons.setdefault(reason, {})
            by_source[source] = by_source.get(source, 0) + number
    ranked = sorted(reasons.items(), key=lambda item: -sum(item[1].values()))
    most = sum(ranked[0][1].values()) if ranked else 1
    return {
        "report": its_own if (run.folder / its_own).is_file() else "",
        "sources": [{"source": source, **row} for source, row in counts.items()],
        "total": {name: sum(row.get(name, 0) for row in counts.values()) for name in (*names, "kept_bytes")},
        "reasons": [
            {"reason": reason, "count": sum(parts.values()), "parts": [(s, n, n / most) for s, n in parts.items()]}
            for reason, parts in ranked
        ],
    }


def result(row: Row) -> dict[str, Any]:
    """One evaluation result, with its 95 % interval on a scale from 0 to 1 where it is a share."""
    value, error = row["value"], row.get("stderr")
    share = None if value is None or not 0 <= value <= 1 else value
    reach = 1.96 * error if error and math.isfinite(error) else 0
    interval = None if share is None else (max(0.0, share - reach), min(1.0, share + reach))
    metric = row["metric"].removesuffix(",none")
    return {"task": row["task"], "metric": metric, "value": value, "stderr": error, "n": row.get("n"),
            "share": share, "interval": interval}  # fmt: skip


def search(trials: list[Row]) -> dict[str, Any]:
    """Trials by loss, best first, with the settings that differ between them; failed ones (no loss) last."""
    if not trials:
        return {}
    losses = [trial["loss"] for trial in trials if finite(trial["loss"])]
    best, worst = (min(losses), max(losses)) if losses else (0.0, 0.0)
    names = list(dict.fromkeys(name for trial in trials for name in trial["config"]))
    values = {name: [trial["config"].get(name) for trial in trials] for name in names}
    varied = [name for name in names if any(value != values[name][0] for value in values[name])] or names
    ranked = sorted(trials, key=lambda trial: trial["loss"] if finite(trial["loss"]) else math.inf)
    return {
        "settings": [name if "." in name else name.replace("_", " ") for name in varied],
        "fixed": [units.fact(name, values[name][0]) for name in names if name not in varied],
        "trials": [
            {
                "values": [setting(trial["config"].get(name)) for name in varied],
                "loss": trial["loss"] if finite(trial["loss"]) else None,
                "steps": trial.get("steps"),
                "error": trial.get("error"),
                "place": (trial["loss"] - best) / ((worst - best) or 1) if finite(trial["loss"]) else None,
            }
            for trial in ranked
        ],
    }


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def setting(value: Any) -> str:
    """A setting's value as written in a configuration: numbers in full where that is short."""
    return f"{value:.4g}" if isinstance(value, float) else units.fact("", value)[1]
