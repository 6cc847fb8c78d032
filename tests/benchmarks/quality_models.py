"""Quality models on one thread: trees and hashed n-grams in documents/s, the encoder's int8 graph against torch.

The trees' figure is of what comes on top of the rules, which measure the signals anyway; the n-grams' begins with a
text's words, which the rules need too. The encoder has MiniLM-L6's shape (6 layers, 384 wide, 12 heads), is made from
its config, and reads 512 tokens a text: torch in float32 in one batch, ONNX Runtime in int8 text by text, in turn.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from danube_ray.config import NO_RULES
from danube_ray.curate.heuristics import judge
from danube_ray.curate.quality.building import write_base, write_graph
from danube_ray.curate.quality.encoder import OnnxRunner, Runner, TorchRunner
from danube_ray.curate.quality.fitting import fit
from danube_ray.curate.quality.gbm import as_table
from danube_ray.curate.quality.linear import buckets
from danube_ray.curate.quality.settings import EncoderSettings, QualitySettings
from danube_ray.curate.words import tokenize
from tests.benchmarks.pairs import compare, median_interval, record
from tests.curate.quality.corpus import text
from tests.curate.quality.made import passages_of

DOCUMENTS, AT_ONCE, TEXTS, TOKENS, PAIRS = 2_000, 256, 4, 512, 15
MINILM = EncoderSettings(num_layers=6, hidden_size=384, num_heads=12, max_tokens=TOKENS, vocab_size=2_000)


def main() -> None:
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    texts = [" ".join(text(generator, number % 2 == 0) for _ in range(3)) for number in range(DOCUMENTS)]
    result = {**trees_and_ngrams(texts), **encoder(texts[:200])}
    record("quality_models", result)


def trees_and_ngrams(texts: list[str]) -> dict[str, object]:
    settings = QualitySettings(encoder=None)
    labeled = {"good": (True, texts[::2]), "raw": (False, texts[1::2])}
    model = fit(passages_of(labeled, settings), settings)
    verdicts = [judge(one, NO_RULES) for one in texts]
    signals = [verdict.signals for verdict in verdicts]
    hashed = [buckets(verdict.words, model.num_buckets) for verdict in verdicts]
    scores = np.array([model.linear.score(row) for row in hashed])

    def trees() -> None:
        for start in range(0, DOCUMENTS, AT_ONCE):
            rows = as_table(signals[start : start + AT_ONCE], model.names)
            some = np.column_stack((rows, scores[start : start + AT_ONCE]))
            model.platt(np.asarray(model.trees.predict(some, raw_score=True, num_threads=1)))

    def ngrams() -> None:
        for words in fresh:
            model.linear.score(buckets(words, model.num_buckets))

    found: dict[str, object] = {"words_per_document": statistics.mean(len(verdict.words) for verdict in verdicts)}
    speeds: dict[str, list[float]] = {"trees": [], "ngrams": []}
    for _ in range(PAIRS):
        fresh = [tokenize(one) for one in texts]  # a Words keeps its hashes
        speeds["trees"].append(DOCUMENTS / timed(trees))
        speeds["ngrams"].append(DOCUMENTS / timed(ngrams))
    for name, values in speeds.items():
        low, high = median_interval(values)
        aim = "  (aim: at least 20,000)" if name == "trees" else ""
        print(f"{name}: {statistics.median(values):,.0f} [{low:,.0f}, {high:,.0f}] documents/s{aim}")
        found[f"{name}_documents_per_s"] = values
    return found


def encoder(texts: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "encoder"
        write_base(MINILM, texts, folder, seed=1)
        write_graph(folder)
        int8, float32 = OnnxRunner(folder / "model.int8.onnx"), TorchRunner(folder, "cpu")
    tokens = np.random.default_rng(1).integers(5, 100, (TEXTS, TOKENS)).tolist()
    difference = float(np.abs(int8(tokens) - float32(tokens)).max())

    def speed(runner: Runner) -> Callable[[], float]:
        return lambda: TEXTS / timed(lambda: runner(tokens))

    ratio, figures = compare(speed(int8), speed(float32), PAIRS)
    speeds = [statistics.median(column) for column in zip(*figures, strict=True)]
    has_vnni = "vnni" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else None
    print(f"encoder, int8 / torch float32 at {TOKENS} tokens: {ratio}  (aim: at least 1.8 with VNNI: {has_vnni})")
    print(f"encoder: {speeds[0]:.1f} and {speeds[1]:.1f} documents/s, log-odds differ by at most {difference:.4f}")
    facts = {"vnni": has_vnni, "max_logit_difference": difference, "documents_per_s": figures}
    return {"encoder": {"ratio": dataclasses.asdict(ratio), **facts}}


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
