"""A Hugging Face tokenizer as a GGUF header says it, so that llama.cpp's ids are the trained ones.

A sentencepiece model (`tokenizer.model`: Llama 1 and 2, Mistral, Danube) is taken as it stands. Without one,
`tokenizer.json` must hold a BPE of one of two styles: sentencepiece's with byte fallback, or that of bytes (Llama 3,
GPT-2), whose way to split text llama.cpp knows by name. Rows of the embedding that no piece has get unused ones.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from danube_ray.artifacts import read_json
from danube_ray.config import ConfigError, require
from danube_ray.data.tokenizer import SPACE, model_format

LAST = -1e9  # a score that every other goes before
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# Steps of the pre-tokenizer, in order, and llama.cpp's name for them; ByteLevel's own splitting is GPT-2's.
SPLITS = {
    (("Split", LLAMA3_SPLIT), ("ByteLevel", False)): "llama-bpe",
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
}

Piece = tuple[str, float, TokenType]


def write_vocabulary(writer: GGUFWriter, model_folder: Path, vocab_size: int) -> None:
    """Everything under `tokenizer.`; `ConfigError` for a tokenizer that llama.cpp would not follow."""
    if (model_folder / "tokenizer.model").is_file():
        _write_sentencepiece(writer, model_folder, vocab_size)
    elif (model_folder / "tokenizer.json").is_file():
        _write_bpe(writer, model_folder, vocab_size)
    else:
        raise ConfigError("tokenizer", str(model_folder), "a folder with tokenizer.model, or tokenizer.json")
    if template := _chat_template(model_folder):
        writer.add_chat_template(template)


def _write_sentencepiece(writer: GGUFWriter, model_folder: Path, vocab_size: int) -> None:
    model_file = model_folder / "tokenizer.model"
    pieces = _sentencepiece(model_file)
    marks = (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())
    require(min(marks) >= 0, f"ids of <unk>, <s> and </s> in {model_file}", marks, "pieces of the vocabulary")

    def kind(piece: int) -> TokenType:
        if pieces.is_unknown(piece):
            return TokenType.UNKNOWN
        if pieces.is_control(piece):
            return TokenType.CONTROL
        if pieces.is_byte(piece):
            return TokenType.BYTE
        return TokenType.UNUSED if pieces.is_unused(piece) else TokenType.NORMAL

    added = {i: (text, LAST, kind) for i, (text, kind) in _added(model_folder).items() if i < vocab_size}
    own = {i: (pieces.id_to_piece(i), pieces.get_score(i), kind(i)) for i in range(pieces.vocab_size())}
    _write_pieces(writer, {**added, **own}, vocab_size, with_scores=True)
    # sentencepiece's add_dummy_prefix, seen from outside: does the first word get the space marker?
    _write_llama_style(writer, pieces.encode("a", out_type=str), *marks)


def _sentencepiece(model_file: Path) -> SentencePieceProcessor:
    """The tokenizer; `ConfigError` when it is torn, or does what llama.cpp does not: unigrams, or a normalised text."""
    try:
        pieces = SentencePieceProcessor(model_file=str(model_file))
    except (RuntimeError, OSError) as error:
        raise ConfigError("tokenizer", str(model_file), f"a whole sentencepiece model ({error})") from None
    model = model_format.ModelProto.FromString(pieces.serialized_model_proto())
    kind = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}[model.trainer_spec.model_type]
    require(kind == "BPE", f"type of {model_file}", kind, "'BPE', the one that llama.cpp computes")
    changes = model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces
    name = model.normalizer_spec.name
    require(not changes, f"normalizer of {model_file}", name, "identity with all spaces kept, as llama.cpp has it")
    return pieces


def _write_bpe(writer: GGUFWriter, model_folder: Path, vocab_size: int) -> None:
    path = model_folder / "tokenizer.json"
    read = read_json(path)
    model, remedy = read["model"], "add the tokenizer.model that it was made from, if there is one"
    require(model["type"] == "BPE", f"model of {path}", model["type"], "'BPE'", remedy)
    merges = [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    pieces: dict[int, Piece] = {i: (text, LAST, TokenType.NORMAL) for text, i in model["vocab"].items()}
    fast = tokenizers.Tokenizer.from_file(str(path))
    bos, eos = _mark(model_folder, fast, "bos"), _mark(model_folder, fast, "eos")
    steps = _steps(read["pre_tokenizer"])
    added_tokens = read.get("added_tokens", [])
    added = {
        token["id"]: (token["content"], LAST, TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        for token in added_tokens
        if token["id"] < vocab_size  # some name one that the embeddings have no row for
    }
    if model.get("byte_fallback"):
        _require_plain_spaces(read, path, remedy)
        _require_every_pair(merges, model["vocab"].keys() - {token["content"] for token in added_tokens}, path, remedy)
        for rank in range(len(merges) - 1, -1, -1):  # a piece that several pairs make has the score of the first
            joined = "".join(merges[rank])
            pieces[model["vocab"][joined]] = (joined, -float(rank), TokenType.NORMAL)
        spelled = {i: (text, 0.0, TokenType.BYTE) for text, i in model["vocab"].items() if _is_byte(text)}
        _write_pieces(writer, {**pieces, **spelled, **added}, vocab_size, with_scores=True)
        unknown = model["vocab"][model["unk_token"]]
        _write_llama_style(writer, fast.encode("a", add_special_tokens=False).tokens, unknown, bos, eos)
        return
    allowed = "splits of Llama 3, GPT-2 or SmolLM over bytes, with nothing normalised before"
    split = SPLITS.get(tuple(steps)) if read["normalizer"] is None else None
    if split is None:
        raise ConfigError(f"pre-tokenizer of {path}", steps, allowed, remedy)
    ignores = bool(model.get("ignore_merges"))  # llama.cpp does so for Llama 3's split and for no other
    require(ignores == (split == "llama-bpe"), f"ignore_merges in {path}", ignores, f"what {split} has", remedy)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    _write_pieces(writer, {**pieces, **added}, vocab_size, with_scores=False)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    ids = fast.encode("a").ids
    writer.add_add_bos_token(ids[0] == bos)
    writer.add_add_eos_token(ids[-1] == eos)


def _write_llama_style(writer: GGUFWriter, first_word: Sequence[str], unknown: int, bos: int, eos: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_unk_token_id(unknown)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(first_word[0].startswith(SPACE))


def _write_pieces(writer: GGUFWriter, pieces: dict[int, Piece], vocab_size: int, with_scores: bool) -> None:
    """The pieces by id, and unused ones up to the embedding's rows."""
    most = max(pieces) + 1
    require(most <= vocab_size, "vocab_size", vocab_size, f"at least the tokenizer's {most} pieces")
    rows = [pieces.get(i, (f"[PAD{i}]", -1000.0, TokenType.UNUSED)) for i in range(vocab_size)]
    writer.add_token_list([text.encode() for text, _, _ in rows])
    if with_scores:
        writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])


def _added(model_folder: Path) -> dict[int, tuple[str, TokenType]]:
    """Text and type of what transformers added to the tokenizer, by id."""
    config, plain = model_folder / "tokenizer_config.json", model_folder / "added_tokens.json"
    added = {i: (text, TokenType.CONTROL) for text, i in read_json(plain).items()} if plain.is_file() else {}
    for i, token in (read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}).items():
        added[int(i)] = (token["content"], TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)
    return added


def _mark(model_folder: Path, fast: tokenizers.Tokenizer, which: str) -> int:
    """Id of the token that begins or ends a text, by tokenizer_config.json, or else by config.json."""
    path = model_folder / "tokenizer_config.json"
    token = read_json(path).get(f"{which}_token") if path.is_file() else None
    text = token["content"] if isinstance(token, dict) else token
    known = fast.token_to_id(text) if text else None
    found = read_json(model_folder / "config.json").get(f"{which}_token_id") if known is None else known
    one = found[0] if isinstance(found, list) else found
    require(isinstance(one, int), f"{which}_token of {model_folder}", one, "a token of the vocabulary")
    return one


def _steps(step: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """What a pre-tokenizer does, flat: each step's type and the setting that matters."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [each for inner in step["pretokenizers"] for each in _steps(inner)]
    if kind == "Split":
        plain = step["behavior"] == "Isolated" and not step["invert"]
        return [(kind, step["pattern"].get("Regex") if plain else step)]
    if kind == "ByteLevel":
        return [(kind, step if step["add_prefix_space"] else step["use_regex"])]
    return [(kind, step.get("individual_digits", step))]


def _require_plain_spaces(read: dict[str, Any], path: Path, remedy: str) -> None:
    """`ConfigError` unless all that is done to a text is to write its spaces as sentencepiece does."""
    normalizer = read["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [step for step in steps if step not in (spaces, {"type": "Prepend", "prepend": SPACE})]
    split = read["pre_tokenizer"]
    whole = split is None or (split["type"] == "Metaspace" and split.get("split") is False)
    require(whole and not before, f"normalizer of {path}", before or split, "spaces written as U+2581, no more", remedy)


def _require_every_pair(merges: Sequence[tuple[str, ...]], pieces: Set[str], path: Path, remedy: str) -> None:
    """`ConfigError` unless any two pieces that make a third are merged, one rank after the other for each third.

    Sentencepiece and llama.cpp join whatever makes a piece, by the piece's score; `tokenizers` joins listed pairs only.
    """
    known, texts = set(merges), ["".join(pair) for pair in merges]
    splits = ((text[:at], text[at:]) for text in pieces if not _is_byte(text) for at in range(1, len(text)))
    left_out = next((pair for pair in splits if pair not in known and pieces >= set(pair)), None)
    ranks = len([text for text, _ in groupby(texts)])
    alike = left_out is None and ranks == len(set(texts))
    found = "pairs of a piece far apart" if left_out is None else f"no {left_out}"
    require(alike, f"merges of {path}", found, "those that sentencepiece would make", remedy)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _chat_template(model_folder: Path) -> str | None:
    if (model_folder / "chat_template.jinja").is_file():
        return (model_folder / "chat_template.jinja").read_text()
    path = model_folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several by name; the one for chat is called so
        return next((each["template"] for each in template if each["name"] == "default"), None)
    return template
