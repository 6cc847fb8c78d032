"""The model card: what the models were trained on, how well they do, and what that does not mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from danube_ray.artifacts import read_json, write_atomically, write_json

NAMES = {"gbm": "gradient-boosted trees", "encoder": "encoder", "cascade": "cascade"}
COLORS = {"gbm": "#2a6f97", "encoder": "#c8553d", "cascade": "#3a7d44"}
MARKERS = {"gbm": "o", "encoder": "s", "cascade": "^"}
PLOT = "calibration.png"

UNSTATED = """\
Danube2's report says that heuristics and small models, a gradient-boosted one and a BERT, predicted quality. It does \
not say what their labels were, which features the first one had, nor which library: labels, features and LightGBM are \
this project's choice, and nothing here reproduces theirs."""

CONTROL = """\
The labels come from folders, so a model can be right about held-out documents of the same sources by recognising the \
source. Two controls, on the gradient-boosted model (at most 1,000 training passages of a source): the same training \
with labels shuffled over the sources, where "good" is but a set of names, and each source left out of training and \
judged, unseen, against held-out documents of the other class."""


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write card.json, calibration.png and card.md. Raises nothing for figures that are NaN: they print as such."""
    write_json(folder / "card.json", facts)
    plot_calibration(folder / PLOT, facts["models"])
    write_atomically(folder / "card.md", "\n".join(_lines(facts)) + "\n")


def read_card(folder: Path) -> str:
    """The card's text. Raises `ArtifactError` where there is none."""
    read_json(folder / "card.json")
    return (folder / "card.md").read_text()


def plot_calibration(path: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """How often texts of a predicted probability are good, against that probability, and how many there are.

    A mark's size goes with the number of its texts: a few far from the diagonal say little.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot((0, 1), (0, 1), color="#999999", linewidth=1, linestyle="--", zorder=0)
    width = 0.08 / len(models)
    for number, (name, measured) in enumerate(models.items()):
        means, shares, counts = zip(*measured["reliability"], strict=True)
        sizes = [15 + 25 * math.log10(count) for count in counts]
        above.scatter(means, shares, sizes, color=COLORS[name], marker=MARKERS[name], alpha=0.8, label=NAMES[name])
        left = [min(9, int(mean * 10)) / 10 + 0.01 + width * (number + 0.5) for mean in means]
        below.bar(left, counts, width, color=COLORS[name])
    above.set(ylabel="share of good texts", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    below.set(xlabel="quality (predicted probability)", ylabel="texts", yscale="log", ylim=(0.7, None))
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False, markerscale=0.8)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    good, raw = ([name for name, is_good in facts["sources"].items() if is_good is wanted] for wanted in (True, False))
    yield "# Quality models"
    yield ""
    yield f"Good text ({', '.join(good)}) against raw text ({', '.join(raw)}). `quality` is the probability that a"
    yield "text is of the good ones, where both are equally frequent."
    yield ""
    yield UNSTATED
    yield ""
    yield from _figures(facts)
    yield from _control(facts["control"])
    yield from _data(facts)
    yield from _making(facts)


def _figures(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## On held-out documents"
    yield ""
    threshold = facts["threshold"]
    yield f"| at {threshold:g} | AUC | 95 % | AUC where the rules pass | precision | recall | raw kept |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, row in facts["models"].items():
        interval = f"{row['auc_low']:.4f} to {row['auc_high']:.4f}"
        shares = " | ".join(f"{row[key]:.3f}" for key in ("precision", "recall", "raw_kept"))
        yield f"| {NAMES[name]} | {row['auc']:.4f} | {interval} | {row['auc_passing']:.4f} | {shares} |"
    yield ""
    yield "Classes weigh the same; intervals are resampled by document. These AUCs stand beside their control, below."
    yield ""
    sent = facts["sent_to_encoder"]
    low, high = facts["band"]["low"], facts["band"]["high"]
    if "encoder" in facts["models"] and low > high:
        yield (
            "The encoder is asked nowhere: where the trees are least sure it was no better, on the calibration part, "
            "than they are. Train on more text, or name a trained BERT with `--encoder`."
        )
        yield ""
    elif "encoder" in facts["models"]:
        yield (
            f"The encoder judges where the trees' probability is between {low:.3g} and {high:.3g}: "
            f"{sent['of_raw']:.1%} of held-out raw and {sent['of_good']:.1%} of good passages. The largest difference "
            f"between its int8 log-odds and float32's was {facts['max_logit_difference']:.4f}. {_use(facts['models'])}"
        )
        yield ""
    yield f"![calibration]({PLOT})"
    yield ""
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in facts["documents_per_s"].items())
    yield f"Documents/s on one thread, each part by itself: {speeds}."
    yield ""


def _use(models: Mapping[str, Mapping[str, Any]]) -> str:
    if models["cascade"]["auc"] >= models["gbm"]["auc"]:
        return "With it the AUC is no lower than the trees' alone."
    return (
        "With it the AUC is lower than the trees' alone: here it does not help. Train without it, on more text, or "
        "from a pretrained one."
    )


def _control(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## Quality, or only the source?"
    yield ""
    yield CONTROL
    yield ""
    yield "| labels | good | AUC, held-out documents | AUC, left-out sources | by source |"
    yield "| --- | --- | --- | --- | --- |"
    true = found["true"]
    for kind, labeling in (("true", true), *(("shuffled", labeling) for labeling in found["shuffled"])):
        by_source = ", ".join(f"{name} {value:.3f}" for name, value in labeling["left_out"].items()) or "none"
        figures = f"{labeling['documents']:.4f} | {_mean(labeling['left_out'].values()):.3f}"
        yield f"| {kind} | {', '.join(labeling['good'])} | {figures} | {by_source} |"
    yield ""
    if not found["shuffled"]:
        yield "There are too few sources to shuffle labels over: name at least three, each with some documents."
        yield ""
        return
    shuffled = _mean(labeling["documents"] for labeling in found["shuffled"])
    level = _mean(_mean(labeling["left_out"].values()) for labeling in found["shuffled"])
    own = _mean(true["left_out"].values())
    yield (
        f"On held-out documents the true labels reach {true['documents']:.4f} and shuffled ones {shuffled:.4f}: "
        f"{_verdict_on_documents(true['documents'], shuffled)}. On sources never seen the true labels reach {own:.3f}, "
        f"shuffled ones {level:.3f}: {_verdict_on_sources(own, level)}."
    )
    yield ""


def _verdict_on_documents(true: float, shuffled: float) -> str:
    if shuffled >= true - 0.02:
        return "recognising the sources explains all of it, and this AUC is no evidence that quality was learned"
    return "recognising the sources explains the second figure, not the difference"


def _verdict_on_sources(true: float, shuffled: float) -> str:
    if math.isnan(true) or math.isnan(shuffled):
        return "with a single source of a class there is none to leave out"
    if true <= max(shuffled, 0.5) + 0.02:
        return "what was learned carries over to new sources no better than arbitrary labels do"
    return "some of what was learned carries over to sources that it was not learned from"


def _data(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data"
    yield ""
    yield "| source | label | records | documents | passages | training | calibration | held-out | rules pass |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, row in facts["data"].items():
        label = "good" if facts["sources"][name] else "raw"
        parts = " | ".join(f"{row[part]:,}" for part in ("training", "calibration", "held-out"))
        yield (
            f"| {name} | {label} | {row['read']:,} | {row['documents']:,} | {row['passages']:,} | {parts} "
            f"| {row['passes']:.0%} |"
        )
    yield ""
    yield (
        "Documents are those in the wanted languages. They are cut into passages; of near-duplicates (those with a "
        "MinHash band in common) one stays; a document's passages are all in one part. What the rules drop is trained "
        "on too, and the AUC above is stated with and without it."
    )
    yield ""


def _making(facts: Mapping[str, Any]) -> Iterator[str]:
    yield "## Making"
    yield ""
    yield (
        f"LightGBM on {len(facts['features'])} signals of the rules (none that counts words or sentences: length would "
        f"tell the source) and the log-odds of a logistic regression over hashed word 1- and 2-grams, out of fold in "
        f"training. By gain: {', '.join(f'{name} {share:.0%}' for name, share in facts['gain'].items())}."
    )
    yield ""
    yield f"Calibration by Platt's two numbers. Seed {facts['seed']}. Settings and figures are in card.json."


def _mean(values: Any) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
