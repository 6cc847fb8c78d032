"""Conversations and pairs: nothing vanishes, what is too long is cut by rule, every example comes once an epoch."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danube_ray.config import ConfigError
from danube_ray.data.chat import Message, render
from danube_ray.data.conversations import (
    ConversationReader,
    PairReader,
    encode_example,
    load_conversations,
    load_pairs,
)
from danube_ray.data.tokenizer import Tokenizer


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


SETTINGS: dict[str, Any] = {"batch_size": 4, "epochs": 1.0, "max_length": 64, "seed": 3}


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {n}?", "response": f"It is the number {n}." + " Yes." * (n % 7)} for n in range(22)]
    return write_lines(tmp_path / "sft.jsonl", rows)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"Is {n} odd?", "chosen": "Yes." * (1 + n % 5), "rejected": "No idea " * n} for n in range(1, 12)
    ]
    return write_lines(tmp_path / "dpo.jsonl", rows)


def folder(tokenizer: Tokenizer) -> Path:
    return tokenizer.model_file.parent


def test_both_forms_of_both_files_load_alike(tmp_path: Path) -> None:
    flat = {"prompt": "Hi", "response": "Hello"}
    turns = {"messages": [user("Hi"), assistant("Hello")]}
    pq.write_table(pa.Table.from_pylist([flat]), tmp_path / "flat.parquet")
    pq.write_table(pa.Table.from_pylist([turns]), tmp_path / "turns.parquet")
    files = [
        write_lines(tmp_path / "flat.jsonl", [flat]),
        write_lines(tmp_path / "turns.jsonl", [turns]),
        tmp_path / "flat.parquet",
        tmp_path / "turns.parquet",
    ]
    for file in files:
        assert load_conversations(file) == ([turns["messages"]], [])
    one = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
    two = {"messages": [user("Hi")], "chosen": "Hello", "rejected": "Go"}
    loaded, quarantine = load_pairs(write_lines(tmp_path / "pairs.jsonl", [one, two]))
    assert loaded == [([user("Hi")], "Hello", "Go")] * 2
    assert quarantine == []


def test_bad_rows_are_quarantined_with_their_reason_and_number(tmp_path: Path) -> None:
    good = {"prompt": "Hi", "response": "Hello"}
    bad = {
        "not json {": "the row is not a JSON object",
        "[1, 2]": "the row is not a JSON object",
        "[" * 100_000: "the row is not a JSON object",
        f'{{"prompt": {"1" * 5_000}}}': "the row is not a JSON object",
        '{"text": "x"}': "neither messages nor prompt",
        '{"prompt": "x"}': "message 2 has no text",
        '{"prompt": "x", "response": "  "}': "message 2 has no text",
        '{"messages": "x"}': "messages is not a list",
        '{"messages": []}': "no user message",
        '{"messages": [{"role": "user", "content": "x"}]}': "last message is not the assistant's",
        '{"messages": [{"role": "bot", "content": "x"}]}': "role 'bot'",
        '{"prompt": "\\ud800", "response": "x"}': "not valid Unicode",
    }
    rows, quarantine = load_conversations(write_lines(tmp_path / "a.jsonl", [good, *bad, good]))
    assert len(rows) == 2
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode())  # as Windows begins a text
    assert load_conversations(tmp_path / "a.jsonl") == (rows[:1], [])
    assert [row.row for row in quarantine] == list(range(2, 2 + len(bad)))
    for row, (line, reason) in zip(quarantine, bad.items(), strict=True):
        assert reason in row.reason, line


def test_bad_pairs_are_quarantined(tmp_path: Path) -> None:
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
    bad = [
        ({**good, "rejected": "Hello"}, "chosen and rejected are the same"),
        ({**good, "chosen": ""}, "chosen: message 2 has no text"),
        ({**good, "rejected": None}, "rejected: message 2 has no text"),
        ({**good, "messages": [user("Hi"), assistant("x")]}, "the prompt's last message is not the user's"),
    ]
    pairs, quarantine = load_pairs(write_lines(tmp_path / "a.jsonl", [good, *(row for row, _ in bad)]))
    assert len(pairs) == 1
    assert [row.reason for row in quarantine] == [reason for _, reason in bad]


def test_a_file_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    cases = {
        tmp_path / "absent.jsonl": "an existing .jsonl or .parquet file",
        write_lines(tmp_path / "a.csv", ["x"]): "ending in .jsonl or .parquet",
        write_lines(tmp_path / "empty.jsonl", []): "the file is empty",
        write_lines(tmp_path / "bad.jsonl", ["x", "y", {"prompt": "x"}]): "2 x the row is not a JSON object",
        tmp_path / "torn.parquet": "a Parquet file",
    }
    for file, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            load_conversations(file)


def test_a_conversation_that_is_too_long_loses_its_oldest_exchanges(trained: Tokenizer) -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    turns = [message for n in range(6) for message in (user(f"Question {n}?"), assistant(f"Answer {n}."))]
    whole, least = (len(render([system, *turns[oldest:]], trained)[0]) for oldest in (0, 10))
    for max_length in range(whole, least - 1, -1):
        example = encode_example([system, *turns[:-1]], ["Answer 5."], trained, max_length)
        assert example is not None
        kept = next(k for k in range(0, 12, 2) if len(render([system, *turns[k:]], trained)[0]) <= max_length)
        assert (example.ids[0], example.trained[0]) == render([system, *turns[kept:]], trained)
        assert example.cut == (kept > 0)
        assert "Be brief." in trained.decode(example.ids[0])


def test_an_answer_that_is_too_long_loses_its_end_and_is_not_taught_to_stop(trained: Tokenizer) -> None:
    ids, learns = render([user("Count."), assistant("one two three " * 30)], trained)
    example = encode_example([user("Count.")], ["one two three " * 30], trained, 40)
    assert example == ([ids[:40]], [learns[:40]], True)
    assert ids[-1] == trained.eos_id
    assert trained.eos_id not in [i for i, learn in zip(ids[:40], learns[:40], strict=True) if learn]
    first = learns.index(True)
    assert encode_example([user("Count.")], ["one two three " * 30], trained, first + 1) is not None
    assert encode_example([user("Count.")], ["one two three " * 30], trained, first) is None
    assert encode_example([user("Count.")], ["one", "two"], trained, first) is None


def test_every_conversation_comes_once_an_epoch_in_an_order_of_its_own(conversations: Path, trained: Tokenizer) -> None:
    reader = ConversationReader(conversations, folder(trained), **{**SETTINGS, "epochs": 2.5})
    assert reader.num_steps == 14  # 55 rows, 4 a step
    rows = []
    for step in range(reader.num_steps):
        batch = reader(step, 0, 1)
        assert batch["tokens"].shape == batch["trained"].shape
        assert batch["tokens"].shape[1] % 16 == 1
        for ids, learns, weight in zip(
            *(batch[name].tolist() for name in ("tokens", "trained", "weight")), strict=True
        ):
            if weight:
                end = len(learns) - learns[::-1].index(1)
                assert set(ids[end:]) <= {trained.eos_id}, "padding"
                rows.append((tuple(ids[:end]), tuple(learns[:end])))
    expected = {tuple(map(tuple, render(messages, trained))) for messages in load_conversations(conversations)[0]}
    epochs = rows[:22], rows[22:44], rows[44:]
    assert set(epochs[0]) == set(epochs[1]) == expected
    assert len(set(epochs[2])) == len(epochs[2]) == 11
    assert epochs[0] != epochs[1]
    assert reader.tokens_at(14) == sum(len(ids) for ids, _ in rows)
    assert [reader.tokens_at(0), reader.tokens_at(1)] == [0, sum(len(ids) for ids, _ in rows[:4])]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_ranks_together_hold_the_step_in_order_and_shape(
    conversations: Path, pairs: Path, trained: Tokenizer, world_size: int
) -> None:
    for reader in (
        ConversationReader(conversations, folder(trained), **SETTINGS),
        PairReader(pairs, folder(trained), **SETTINGS),
    ):
        for step in range(reader.num_steps):
            whole = reader(step, 0, 1)
            parts = [reader(step, rank, world_size) for rank in range(world_size)]
            for name in ("tokens", "trained"):
                assert len({part[name].shape for part in parts}) == 1
                rows = np.concatenate([part[name][part["weight"] == 1] for part in parts])
                assert np.array_equal(rows, whole[name])
            assert not any(part["trained"][part["weight"] == 0].any() for part in parts)


def test_a_pair_shares_its_prompt_and_differs_in_what_is_trained(pairs: Path, trained: Tokenizer) -> None:
    reader = PairReader(pairs, folder(trained), **SETTINGS)
    loaded = {pair.prompt[0]["content"]: pair for pair in load_pairs(pairs)[0]}
    seen = Counter[str]()
    for step in range(reader.num_steps):
        batch = reader(step, 0, 1)
        assert batch["tokens"].shape[1] == 2
        for (chosen, rejected), (learns_chosen, learns_rejected) in zip(
            batch["tokens"].tolist(), batch["trained"].tolist(), strict=True
        ):
            start = learns_chosen.index(1)
            assert start == learns_rejected.index(1)
            assert chosen[:start] == rejected[:start]
            prompt = trained.decode(chosen[:start]).removeprefix("<|prompt|> ").removesuffix(" <|answer|>")
            answer = [i for i, learn in zip(chosen, learns_chosen, strict=True) if learn]
            other = [i for i, learn in zip(rejected, learns_rejected, strict=True) if learn]
            assert answer == [*trained.encode(loaded[prompt].chosen), trained.eos_id]
            assert trained.decode(other) == loaded[prompt].rejected[: len(trained.decode(other))]
            seen[prompt] += 1
    assert seen == Counter(loaded.keys())


def test_facts_account_for_every_row(tmp_path: Path, trained: Tokenizer) -> None:
    rows = [
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Count.", "response": "one two three " * 30},
        {"prompt": "very long " * 50, "response": "x"},
        "not json",
    ]
    reader = ConversationReader(write_lines(tmp_path / "a.jsonl", rows), folder(trained), **SETTINGS)
    facts = reader.facts
    assert (facts.kept, facts.cut, facts.dropped, facts.quarantined) == (2, 1, 1, 1)
    assert facts.tokens == 64 + len(render([user("Hi"), assistant("Hello")], trained)[0])
    assert [row.row for row in reader.quarantine] == [4]
    with pytest.raises(ConfigError, match="max_length is 4, allowed is room for a prompt"):
        ConversationReader(tmp_path / "a.jsonl", folder(trained), **{**SETTINGS, "max_length": 4})


def test_the_hash_names_data_and_settings_and_a_pickle_reads_the_same(conversations: Path, trained: Tokenizer) -> None:
    reader = ConversationReader(conversations, folder(trained), **SETTINGS)
    assert ConversationReader(conversations, folder(trained), **SETTINGS).hash == reader.hash
    hashes = {ConversationReader(conversations, folder(trained), **{**SETTINGS, **change}).hash
              for change in ({}, {"seed": 4}, {"batch_size": 8}, {"max_length": 32}, {"epochs": 2.0})}  # fmt: skip
    assert len(hashes) == 5
    again = pickle.loads(pickle.dumps(reader))
    for name, value in reader(2, 0, 1).items():
        assert np.array_equal(again(2, 0, 1)[name], value)
