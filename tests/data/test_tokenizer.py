"""One tokenizer in two libraries: transformers gives sentencepiece's ids, and text survives the round trip."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from danube_ray.config import ConfigError
from danube_ray.data.tokenizer import Tokenizer, _parts, import_tokenizer, train_tokenizer


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_transformers_gives_the_same_ids(
    tokenizer: Tokenizer, texts: list[str], tmp_path: Path, model_type: str | None
) -> None:
    folder = tokenizer.model_file.parent
    if model_type is not None:  # beside a model's config, AutoTokenizer has rules of its own for each model type
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        config = {"model_type": model_type, "vocab_size": tokenizer.vocab_size, "architectures": ["X"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        folder = tmp_path
    auto = AutoTokenizer.from_pretrained(folder)
    different = [text for text in texts if auto.encode(text, add_special_tokens=False) != tokenizer.encode(text)]
    assert different == []
    assert auto.encode("a b") == [1, *tokenizer.encode("a b")]
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id, len(auto)) == (1, 2, 0, tokenizer.vocab_size)
    for text in texts[:200]:
        assert auto.decode(tokenizer.encode(text)) == text


def test_text_survives_the_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_documents_are_wrapped_in_bos_and_eos(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == [1, *tokenizer.encode(text), 2]


def test_a_book_gets_the_ids_that_it_would_get_in_one_go(
    tokenizer: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    book = " ".join(texts)
    whole = [1, *tokenizer.encode(book), 2]
    for part_characters in (1, 50, 2_000):
        monkeypatch.setattr("danube_ray.data.tokenizer.PART_CHARACTERS", part_characters)
        assert tokenizer.encode_documents(["", book])[1].tolist() == whole
        assert len(_parts(book)) > len(book) / (part_characters + 100)


def test_a_tokenizer_without_spaces_of_its_own_takes_a_text_in_one_go(tmp_path: Path) -> None:
    settings = {"add_dummy_prefix": False, "bos_id": 1, "eos_id": 2, "unk_id": 0, "minloglevel": 2, "vocab_size": 19}
    lines = iter(["the danube is a river and a river is the danube"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(tmp_path / "bare"), **settings)
    tokenizer, text = Tokenizer.load(tmp_path / "bare.model"), "a river is the danube " * 400
    assert tokenizer.encode_documents([text])[0].tolist() == [1, *tokenizer.encode(text), 2]


def test_control_pieces_in_text_stay_text(tokenizer: Tokenizer) -> None:
    for text in ("</s>", "a </s> b", "<s>", "<unk>", "<0x41>"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text


def test_a_continuation_has_no_space_before_it(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode_continuation(text)
        assert tokenizer.decode([*tokenizer.encode("x"), *ids]) == "x" + text


def test_training_is_deterministic_and_makes_what_was_asked(
    trained: Tokenizer, training_texts: list[str], tmp_path: Path
) -> None:
    again = train_tokenizer(iter(training_texts), tmp_path, 1_000)
    assert again.sha256 == trained.sha256
    assert trained.vocab_size == 1_000
    assert trained.pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert trained.pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert [trained.byte_id(byte) for byte in (0, 255)] == [3, 258]
    assert "▁return" in trained.pieces
    assert "▁▁▁▁" in trained.pieces
    assert not [piece for piece in trained.pieces if len(piece) > 1 and any(c.isdigit() for c in piece)][256:]
    assert sum(map(len, map(trained.encode, training_texts))) < sum(map(len, training_texts)) / 2


def test_a_text_of_thousands_of_characters_trains_a_small_vocabulary(tmp_path: Path) -> None:
    rare = [chr(code) for code in range(0x4E00, 0x4E00 + 200)]
    texts = ["the quick brown fox jumps over the lazy dog " * 6 + character for character in rare]
    tokenizer = train_tokenizer(texts, tmp_path, 330)  # the 200 characters don't fit, and needn't: bytes spell them
    assert "▁quick" in tokenizer.pieces
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    with pytest.raises(ConfigError, match=r"vocab_size is 330, allowed is at least \d+ for this text; its script"):
        train_tokenizer(rare, tmp_path, 330)


def test_long_lines_are_trained_on_too(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["zebra quagga " * 5_000], tmp_path, 282)
    assert "▁quagga" in tokenizer.pieces


def test_a_tokenizer_pickles_as_its_path(trained: Tokenizer) -> None:
    data = pickle.dumps(trained)
    assert len(data) < 500
    again = pickle.loads(data)
    assert (again.encode("hello"), again.sha256) == (trained.encode("hello"), trained.sha256)


def test_what_cannot_be_trained_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"vocab_size is 5000, allowed is at most \d+ for this text; give it more text"
    ):
        train_tokenizer(["hello world this is"], tmp_path, 5_000)
    with pytest.raises(ConfigError, match="vocab_size is 256, allowed is more than the 259"):
        train_tokenizer(["hello"], tmp_path, 256)
    for empty in ([], ["", "\n\n"]):
        with pytest.raises(ConfigError, match="tokenizer text"):
            train_tokenizer(empty, tmp_path, 300)
    assert not list(tmp_path.iterdir())


def test_what_is_no_such_tokenizer_is_refused(tmp_path: Path, trained: Tokenizer) -> None:
    from sentencepiece import sentencepiece_model_pb2 as model_format

    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="tokenizer"):
        import_tokenizer(tmp_path / "bad.model", tmp_path / "out")
    with pytest.raises(ConfigError, match="a sentencepiece model file"):
        import_tokenizer(tmp_path / "absent.model", tmp_path / "out")
    with pytest.raises(ConfigError, match="tokenizer"):
        Tokenizer.load(tmp_path)
    model = model_format.ModelProto.FromString(trained.model_file.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    (tmp_path / "bare.model").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="dummy prefix"):
        import_tokenizer(tmp_path / "bare.model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_other_control_ids_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "tokenizer"
    text = iter(["some words to make pieces of", "and some more of them"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(prefix), vocab_size=25, unk_id=2, bos_id=0, eos_id=1, minloglevel=2
    )
    with pytest.raises(ConfigError, match=r"is \(2, 0, 1\), allowed is \(0, 1, 2\)"):
        Tokenizer.load(prefix.with_suffix(".model"))
