"""A finished curation folder, made up: four sources in real Parquet tables, with every reason that curation knows."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from danube_ray.artifacts import commit, write_json
from danube_ray.config import SIGNALS, WEB_RULES, to_dict
from danube_ray.curate.tables import CONTAMINATION, DOCUMENTS, DROPPED, QUARANTINE, TableWriter

Row = dict[str, Any]
SETTINGS = {
    "rules": to_dict(WEB_RULES),
    "rule_sets": {},
    "languages": ["en"],
    "min_language_score": 0.65,
    "max_code_share": 0.5,
    "min_quality": 0.2,
    "near_duplicates": True,
    "min_jaccard": 0.75,
    "benchmarks": {"gsm8k": "eval/gsm8k/test.jsonl"},
}
SOURCES = ("web", "wiki", "academic", "books")
URLS = {
    "web": "https://www.example-{0}.org/articles/{1}/how-the-river-came-to-town.html?utm_source=feed&page={1}",
    "wiki": "https://en.encyclopedia.example/wiki/Topic_{1}",
    "academic": "abstracts-{0}.jsonl.gz#{1}",
    "books": "novels/volume-{0}.txt#{1}",
}
OPENINGS = (
    "The river had frozen over by the second week of December, and the mill stood still.",
    "We study how the width of a channel changes the speed at which a fluid settles.",
    "A good loaf begins the evening before, when flour and water are left to themselves.",
    "The council met on Thursday to decide whether the old station should be kept.",
    "In number theory, a prime gap is the difference between two successive primes.",
    "She had not meant to stay, but the rain went on and the kettle was already warm.",
)
SENTENCES = (
    "Nobody could say how long it would last, though everyone had an opinion.",
    "The measurements agree with earlier ones to within two per cent.",
    "It was built in 1874 and has been repaired many times since.",
    "That is the whole trick, and it works with almost any kind of flour.",
    "Several residents spoke against the plan, and two of them spoke well.",
    "The proof follows from the pigeonhole principle after a change of variables.",
    "He put the letter back into its envelope and looked out at the harbour.",
    "Questions can be sent to |||EMAIL||| before the end of the month.",
    "A map of the region hangs in the hall, faded where the sun reaches it.",
    "Results for the longer run are given in the table below.",
)
FOREIGN = {
    "de": "Der Fluss war in der zweiten Dezemberwoche zugefroren, und die Mühle stand still. Niemand wusste wieso.",
    "fr": "La rivière avait gelé dès la deuxième semaine de décembre, et le moulin ne tournait plus. On attendait.",
    "ja": "川は十二月の第二週にはすっかり凍りつき、水車は止まったままだった。いつまで続くのか、誰にもわからなかった。",
    "ar": "تجمد النهر في الأسبوع الثاني من ديسمبر وتوقفت الطاحونة، ولم يعرف أحد كم سيدوم ذلك.",
}
ATTACK = (
    "<script>document.title = 'taken over'</script><img src=x onerror=alert(1)> \u202eright to left\u202c & 'quoted'"
)


def prose(random_: random.Random, sentences: int) -> str:
    words = [random_.choice(OPENINGS), *(random_.choice(SENTENCES) for _ in range(sentences))]
    return "".join(word + ("\n\n" if number % 5 == 4 else " ") for number, word in enumerate(words)).strip()


def short(random_: random.Random) -> tuple[str, Row]:
    words = random_.randint(6, 49)
    return " ".join((prose(random_, 5)).split()[:words]), {"words": float(words)}


def bulleted(random_: random.Random) -> tuple[str, Row]:
    lines = [f"- {sentence}" for sentence in random_.sample(SENTENCES, 9)]
    return "\n".join(lines), {"words": 110.0, "bullet_lines": random_.uniform(0.91, 1.0)}


def repeated(random_: random.Random) -> tuple[str, Row]:
    line = random_.choice(SENTENCES)
    return "\n".join([random_.choice(OPENINGS)] + [line] * 12), {"duplicate_lines": random_.uniform(0.31, 0.95)}


def curly(random_: random.Random) -> tuple[str, Row]:
    code = "function resize() {\n  const box = document.body;\n  return { width: box.offsetWidth };\n}\n"
    return prose(random_, 6) + "\n\n" + code, {"curly_brackets": random_.uniform(0.001, 0.03)}


def formula(random_: random.Random) -> tuple[str, Row]:
    text = prose(random_, 6) + " Let $x_{n}$ be the n-th term and $\\sum_{k} x_{k}$ its sum."
    return text, {"curly_brackets": random_.uniform(0.001, 0.006)}


def menu(random_: random.Random) -> tuple[str, Row]:
    items = ("Home", "About us", "Products", "News", "Careers", "Contact", "Imprint", "Log in", "Basket (0)")
    return "\n".join(random_.sample(items, 9)), {"punctuated_lines": random_.uniform(0.0, 0.11)}


def program(random_: random.Random) -> tuple[str, Row]:
    code = "import os\n\ndef main():\n    for name in os.listdir('.'):\n        print(name)\n\nmain()\n"
    return code * random_.randint(1, 3), {"code_share": random_.uniform(0.6, 1.0)}


def foreign(random_: random.Random) -> tuple[str, Row]:
    language = random_.choice(list(FOREIGN))
    score = random_.uniform(0.9, 1.0)
    return f"{FOREIGN[language]} " * random_.randint(1, 4), {"language": language, "language_score": score}


def plain(sentences: int = 9) -> Callable[[random.Random], tuple[str, Row]]:
    return lambda random_: (prose(random_, sentences), {})


def weak(random_: random.Random) -> tuple[str, Row]:
    return prose(random_, 5), {"quality": random_.uniform(0.02, 0.199)}


# By source: how many documents each reason drops, and how many are kept.
DROPS: dict[str, tuple[Callable[[random.Random], tuple[str, Row]], tuple[int, int, int, int]]] = {
    "blocked_url": (plain(6), (19, 0, 0, 0)),
    "language": (foreign, (212, 9, 4, 2)),
    "min_words": (short, (171, 66, 3, 1)),
    "max_bullet_lines": (bulleted, (23, 2, 0, 0)),
    "max_duplicate_lines": (repeated, (64, 1, 0, 3)),
    "max_curly_brackets": (curly, (38, 4, 0, 0)),
    "min_punctuated_lines": (menu, (141, 12, 0, 1)),
    "max_code_share": (program, (17, 0, 1, 0)),
    "blocked_word": (plain(7), (6, 0, 0, 1)),
    "contaminated": (plain(6), (5, 0, 0, 0)),
    "min_quality": (weak, (61, 2, 3, 0)),
}
FORMULAS = 122  # academic abstracts dropped for their formulas' brackets: a rule that does not suit a source
KEPT = (702, 388, 411, 164)
CLUSTERS = {"2": 71, "3": 9, "5": 1, "7": 1, "40": 1}
DUPLICATES = (44, 6, 2, 0), (37, 3, 4, 1)  # exact and near
QUARANTINED = {
    "web": {"truncated gzip": 3, "not text": 9, "bad WARC record": 4},
    "wiki": {},
    "academic": {"not JSON": 2},
    "books": {},
}
QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. How many clips?"


class MadeUp:
    """Rows of one source, judged: texts by made-up generators, ids and signals as curation would write them."""

    def __init__(self, source: str, scored: bool) -> None:
        self.source, self.scored, self.number = source, scored, 0
        self.random = random.Random(source)

    def row(self, make: Callable[[random.Random], tuple[str, Row]]) -> Row:
        text, known = make(self.random)
        self.number += 1
        url = URLS[self.source].format(self.random.randint(1, 40), self.number)
        name = hashlib.blake2b(f"{self.source} {url}".encode(), digest_size=16).hexdigest()
        measured = {"words": float(len(text.split())), "language_score": 0.97, "code_share": 0.0}
        measured |= {name: 0.05 for name in SIGNALS if name not in measured}
        measured |= {name: value for name, value in known.items() if name in measured}
        quality = known.get("quality", min(0.999, self.random.betavariate(5, 2) * 0.8 + 0.2)) if self.scored else None
        return {"id": name, "text": text, "source": self.source, "url": url, "language": known.get("language", "en"),
                "quality": quality} | {f"signal_{name}": value for name, value in measured.items()}  # fmt: skip

    def near(self, kept: Row) -> Row:
        """A copy of a kept document with some words changed, at a similarity to match."""
        words = kept["text"].split(" ")
        for place in range(30, len(words), 41):
            words[place] = "altogether"
        again = self.row(lambda _: (" ".join(words), {}))
        return again | {"reason": "near_duplicate", "duplicate_of": kept["id"],
                        "similarity": self.random.uniform(0.75, 0.999)}  # fmt: skip


def write_rows(folder: Path, rows: list[Row], schema: pa.Schema, splits: int) -> None:
    for split in range(splits):
        name = hashlib.blake2b(f"{folder.name} {split}".encode(), digest_size=8).hexdigest()
        with TableWriter(folder / f"{name}.parquet", schema) as table:
            for row in rows[split::splits]:
                table.add(row)


def bins(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def log2_chars(row: Row) -> str:
    return f"{max(1, len(row['text'])).bit_length() - 1:02}"


def write_source(folder: Path, index: int, scored: bool) -> Row:
    """Write one source's tables; its counts."""
    source = SOURCES[index]
    made = MadeUp(source, scored)
    kept = [made.row(plain(made.random.randint(4, 60))) for _ in range(KEPT[index])]
    dropped = [made.row(make) | {"reason": reason}
               for reason, (make, numbers) in DROPS.items() for _ in range(numbers[index])
               if scored or reason != "min_quality"]  # fmt: skip
    if source == "academic":
        dropped += [made.row(formula) | {"reason": "max_curly_brackets"} for _ in range(FORMULAS)]
    if source == "web":
        hostile = made.row(lambda _: (ATTACK, {"words": 9.0}))
        kept.append(hostile | {"url": f"https://example.org/{ATTACK}"})
        dropped.append(made.row(lambda _: (f"{ATTACK} again", {"words": 10.0})) | {"reason": "min_words"})
    exact, near = (numbers[index] for numbers in DUPLICATES)
    for original in kept[:exact]:
        again = made.row(lambda _, text=original["text"]: (text, {}))
        dropped.append(again | {"reason": "duplicate", "duplicate_of": original["id"], "similarity": 1.0})
    dropped += [made.near(original) for original in kept[exact : exact + near]]
    bad = [{"source": source, "url": f"{source}/part-{number:05}.warc.gz", "offset": 7_919 * number, "reason": reason,
            "sample": f"\0\x1f{ATTACK if number == 0 else 'raw bytes'} {number}"}
           for reason, times in QUARANTINED[source].items() for number in range(times)]  # fmt: skip
    write_rows(folder / "documents" / source, kept, DOCUMENTS, 3)
    write_rows(folder / "dropped" / source, dropped, DROPPED, 3)
    write_rows(folder / "quarantine" / source, bad, QUARANTINE, 1)
    return {
        "read": len(kept) + len(dropped) + len(bad),
        "kept": len(kept),
        "dropped": len(dropped),
        "quarantined": len(bad),
        "kept_bytes": sum(len(row["text"].encode()) for row in kept),
        "dropped_by": dict(Counter(row["reason"] for row in dropped).most_common()),
        "quarantined_by": QUARANTINED[source],
        "skipped_by": {"request": 118, "image": 32} if source == "web" else {},
        "languages": dict(Counter(row["language"] for row in kept + dropped).most_common()),
        "lengths": bins(map(log2_chars, kept)),
        "lengths_dropped": bins(map(log2_chars, dropped)),
        "qualities": bins(f"{int(row['quality'] * 20) / 20:.2f}" for row in kept) if scored else {},
        "masked": {"email": 31 + index, "ip": 4} if source in ("web", "wiki") else {},
    }


def write_curation(folder: Path, scored: bool = True) -> Path:
    """A whole curation folder, with quality scores or without."""
    counts = {source: write_source(folder, index, scored) for index, source in enumerate(SOURCES)}
    with TableWriter(folder / "contamination.parquet", CONTAMINATION) as table:
        for number in range(5):
            evidence = f"Copied from a forum: {QUESTION.replace('April', 'June')} Answer {72 + number}."
            table.add({"id": f"{number:032x}", "source": "web", "url": f"forum.html#{number}", "benchmark": "gsm8k",
                       "item": 7 + number, "coverage": 0.84, "question": QUESTION, "evidence": evidence})  # fmt: skip
    exact, near = (sum(numbers) for numbers in DUPLICATES)
    commit(
        folder,
        inputs="4f0c2a9be1d7",
        curation_version=2,
        counts=counts,
        duplicates={
            "documents": 1_758,
            "exact": exact,
            "near": near,
            "clusters": {"2": 71, "3": 9, "5": 1, "7": 1, "40": 1},
        },
        contaminated={"gsm8k": {"documents": 5, "items": 5}},
        settings=SETTINGS if scored else {**SETTINGS, "min_quality": 0.0},
    )
    rows: list[Row] = [
        {"step": step, "source": source, "documents": row["read"], "bytes": 4_100 * row["read"],
         "seconds": row["read"] / speed, "wall_s": wall_s}
        for step, speed, wall_s in (("judge", 510, 2.4), ("finish", 22_000, 0.3)) for source, row in counts.items()
    ]  # fmt: skip
    rows.insert(len(counts), {"step": "deduplicate", "source": None, "wall_s": 1.9})
    write_json(folder / "throughput.json", rows)
    return folder
