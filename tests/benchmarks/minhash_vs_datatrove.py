"""MinHash against datatrove, on the same documents and one core: signatures, and what is found of planted copies.

    speed       CPU time from text to band keys against datatrove's `MinhashDedupSignature` as FineWeb sets it (spaCy
                words, SHA-1 of 64 bits; both 14 x 8 over word 5-grams); each turn has documents of its own
    recall      of copies with words replaced, sentences dropped, a header and a footer added, by true similarity
    precision   the share of documents named as duplicates whose similarity is what was asked for, before and after
                verification

Similarities are those of sets of five words as strings: nothing that the measured code hashes.
"""

from __future__ import annotations

import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice

import numpy as np

from danube_ray.curate.dedup import band_keys, choose, fingerprint, forest, members, shingles, star_pairs
from danube_ray.curate.words import tokenize
from tests.benchmarks.pairs import compare, record
from tests.benchmarks.texts import load

PAIRS, DOCUMENTS_A_TURN = 30, 40
MIN_JACCARD, NUM_ORIGINALS, MIN_WORDS = 0.8, 2_500, 60
RANGES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
SENTENCE = re.compile(r"(?<=[.!?])\s+")


def main() -> None:
    texts = load()
    speed = compare_speed(texts)
    found = find_planted(texts)
    record("minhash_vs_datatrove", {"timed": "processor time, one core each", **speed, **found})


def compare_speed(texts: list[str]) -> dict[str, object]:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    with tempfile.TemporaryDirectory() as folder:
        theirs = MinhashDedupSignature(folder, MinhashConfig(hash_config=HashConfig(hash_fc="sha1")))
        turns = {"ours": batches(texts), "theirs": batches(texts)}

        def run(who: str, sign: Callable[[str], object]) -> Callable[[], float]:
            return lambda: megabytes_a_second(next(turns[who]), sign)

        both = run("ours", lambda text: band_keys(tokenize(text))), run("theirs", lambda text: signed(theirs, text))
        for _ in range(2):
            both[0](), both[1]()
        ratio, figures = compare(*both, PAIRS)
    tokenized = statistics.median(megabytes_a_second(batch, tokenize) for batch in islice(batches(texts), PAIRS))
    ours, datatrove = (statistics.median(column) for column in zip(*figures, strict=True))
    print(f"signatures: ours / datatrove's: {ratio}  (aim: at least 10)")
    print(
        f"signatures: {ours:.2f} and {datatrove:.2f} MB/s a core; {tokenized:.1f} for tokenization, which rules share"
    )
    return {"ratio": ratio, "mb_per_s": figures, "tokenization_mb_per_s": tokenized}


def signed(step: object, text: str) -> object:
    found = step.get_shingles(text)
    return step.get_signature(found) if found.size else None


def batches(texts: list[str]) -> cycle[list[str]]:
    starts = range(0, len(texts) - DOCUMENTS_A_TURN, DOCUMENTS_A_TURN)
    return cycle([texts[start : start + DOCUMENTS_A_TURN] for start in starts])


def megabytes_a_second(texts: list[str], sign: Callable[[str], object]) -> float:
    num_bytes = sum(len(text.encode()) for text in texts)
    began = time.process_time()
    for text in texts:
        sign(text)
    return num_bytes / 1e6 / (time.process_time() - began)


def find_planted(texts: list[str]) -> dict[str, object]:
    rng = random.Random(0)
    originals = list(islice((text for text in texts if len(WORD.findall(text)) >= MIN_WORDS), NUM_ORIGINALS))
    corpus = originals + [copy_of(rng, text, originals) for text in originals]
    sets = [word_fives(text) for text in corpus]
    planted = [(index, len(originals) + index) for index in range(len(originals))]

    words = [tokenize(text) for text in corpus]
    keys = [band_keys(one) for one in words]
    shared = {pair: bool(np.intersect1d(keys[pair[0]], keys[pair[1]]).size) for pair in planted}
    recall = by_range(planted, shared, sets)
    for label, (hit, total) in recall.items():
        print(f"recall at similarity {label}: {hit / max(1, total):.3f} of {total}")

    documents = np.repeat(np.arange(len(corpus)), len(keys[0]))
    pairs = np.unique(star_pairs(np.concatenate(keys), documents), axis=0)
    kept = verified(corpus, [shingles(one) for one in words], members(forest(len(corpus), [pairs])))
    named = {"before": pairs.tolist(), "after": list(kept.items())}
    precision = {when: share(similarity(sets, *pair) >= MIN_JACCARD for pair in found) for when, found in named.items()}
    high = [pair for pair in planted if similarity(sets, *pair) >= MIN_JACCARD]
    dropped = share(any(one in kept for one in pair) for pair in high)
    print(f"recall from end to end at similarity {MIN_JACCARD}: {dropped:.3f}  (aim: at least 0.95)")
    print(
        f"precision at similarity {MIN_JACCARD}: {precision['after']:.3f} of {len(kept)} documents dropped "
        f"(aim: at least 0.95); of the {len(pairs)} pairs that share a band {precision['before']:.3f}"
    )
    counts = {"dropped": len(kept), "pairs_that_share_a_band": len(pairs), "planted": len(planted)}
    return {"recall": recall, "recall_end_to_end": dropped, "precision": precision, **counts}


def copy_of(rng: random.Random, text: str, others: list[str]) -> str:
    """Changed in one of three ways, so much that a tenth to half of its sets of five words differ."""
    strength = rng.uniform(0.01, 0.35)
    way = rng.randrange(3)
    if way == 0:  # words replaced, each of which is in five sets
        pieces = re.split(r"(\s+)", text)
        return "".join(
            rng.choice(("river", "seven", "open", "later", "quite"))
            if word.strip() and rng.random() < strength / 5
            else word
            for word in pieces
        )
    if way == 1:
        return " ".join(sentence for sentence in SENTENCE.split(text) if rng.random() >= strength)
    added = WORD.findall(rng.choice(others))[: max(4, int(strength * len(WORD.findall(text)) / 2))]
    return f"{' '.join(added)}\n\n{text}\n\n{' '.join(reversed(added))}"


def verified(corpus: list[str], sets: list[np.ndarray], clustered: np.ndarray) -> dict[int, int]:
    """Which document is kept in the place of each that is dropped."""
    clustered = clustered[np.argsort(clustered[:, 1], kind="stable")]
    kept = {}
    for cluster in np.split(clustered[:, 0], np.flatnonzero(np.diff(clustered[:, 1])) + 1):
        choice = choose([fingerprint(corpus[one]) for one in cluster], [sets[one] for one in cluster], MIN_JACCARD)
        kept |= {
            int(one): int(cluster[leader])
            for one, leader in zip(cluster, choice.kept, strict=True)
            if one != cluster[leader]
        }
    return kept


def word_fives(text: str) -> set[tuple[str, ...]]:
    words = [word.casefold() for word in WORD.findall(text)]
    return set(zip(*(words[start:] for start in range(5)), strict=False))


def similarity(sets: list[set[tuple[str, ...]]], one: int, other: int) -> float:
    return len(sets[one] & sets[other]) / max(1, len(sets[one] | sets[other]))


def by_range(
    planted: list[tuple[int, int]], shared: dict[tuple[int, int], bool], sets: list[set[tuple[str, ...]]]
) -> dict[str, tuple[int, int]]:
    """By range of similarity: how many of how many planted pairs share a band."""
    found = {pair: similarity(sets, *pair) for pair in planted}
    bounds = [*zip(RANGES, [*RANGES[1:-1], 1.01], strict=False), (MIN_JACCARD, 1.01)]
    counts = {}
    for low, high in bounds:
        inside = [shared[pair] for pair in planted if low <= found[pair] < high]
        label = f"{low} to {high}" if high <= 1 else f"at least {low}"
        counts[label] = (sum(inside), len(inside))
    return counts


def share(outcomes) -> float:
    found = list(outcomes)
    return sum(found) / max(1, len(found))


if __name__ == "__main__":
    main()
