"""Real questions for tests, from the shared evaluation data."""

from __future__ import annotations

import json
import re
from pathlib import Path


def arc_easy(shared_data: Path, file: Path, count: int) -> Path:
    """Write the first `count` ARC-Easy questions as a task file; they come wrapped in instructions."""
    source = shared_data / "eval" / "llm_adapters" / "ARC-Easy" / "test.json"
    rows = []
    for row in json.loads(source.read_text())[:count]:
        match = re.fullmatch(r".*?question: (.*?)\n\n(Answer1: .*?)\n\nAnswer format.*", row["instruction"], re.DOTALL)
        assert match is not None
        choices = [choice.strip() for choice in re.split(r"Answer\d: ", match[2])[1:]]
        answer = int(row["answer"].removeprefix("answer")) - 1
        rows.append({"question": match[1], "choices": choices, "answer": answer})
    file.write_text(json.dumps(rows))
    return file
