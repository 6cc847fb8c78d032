"""Sentencepiece BPE with byte fallback: training, import, and the files that let transformers give the same ids.

A tokenizer folder holds `tokenizer.model` (what this project and llama.cpp read), `tokenizer.json` and
`tokenizer_config.json` (what transformers and vLLM read). Text becomes ids as in Llama: nothing is normalised, a space
is put before the text, spaces are the character U+2581, and what the vocabulary lacks is spelled in UTF-8 bytes.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from tokenizers import AddedToken, decoders, models, normalizers, processors

from danube_ray.artifacts import file_hash, write_atomically, write_json
from danube_ray.config import BOS_ID, EOS_ID, UNK_ID, ConfigError, require
from danube_ray.data.chat import CHAT_TEMPLATE
from danube_ray.data.shards import token_dtype

# Protobuf makes a file format's classes when it is imported, where no type checker sees them.
model_format: Any = import_module("sentencepiece.sentencepiece_model_pb2")

MODEL_FILE = "tokenizer.model"
CONTROL_PIECES = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
SPACE = "\u2581"
ROLE_CHARACTERS = "<|>"  # pieces in every vocabulary: else text that spells a role marker could get the marker's ids
WORD_BEGINS = re.compile(rf"(?<=[^ {SPACE}]) (?=[^ {SPACE}])")
PART_CHARACTERS = 2_000  # sentencepiece takes twice as long for the characters of a book as for those of a page
MAX_LINE_CHARACTERS = 1_000  # the trainer drops longer lines (over 4,192 bytes) without a word: cut them instead
TRAINING_THREADS = 2


class Tokenizer:
    """A sentencepiece model whose `<unk>`, `<s>` and `</s>` are ids 0, 1 and 2. Pickles as its path."""

    def __init__(self, model_file: Path) -> None:
        self.model_file = model_file
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        found, wanted = (self.unk_id, self.bos_id, self.eos_id), (UNK_ID, BOS_ID, EOS_ID)
        remedy = "shards and checkpoints know documents by these ids"
        require(found == wanted, f"ids of <unk>, <s>, </s> in {model_file}", found, str(wanted), remedy)
        self.space_id: int = self._processor.piece_to_id(SPACE)

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """Open a tokenizer folder or a `tokenizer.model`; `ConfigError` when there is none."""
        model_file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
        if not model_file.is_file():
            raise ConfigError("tokenizer", str(path), f"a folder with {MODEL_FILE}, or such a file")
        return Tokenizer(model_file)

    def __reduce__(self) -> tuple[Callable[[Path], Tokenizer], tuple[Path]]:
        return Tokenizer.load, (self.model_file,)

    @cached_property
    def sha256(self) -> str:
        """Hash of the model file: what shards and runs name their tokenizer by."""
        return file_hash(self.model_file)

    @cached_property
    def pieces(self) -> list[str]:
        """Every piece, by id."""
        return [self._processor.id_to_piece(index) for index in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with the space before it that sentencepiece adds; control pieces in the text are text."""
        return self._processor.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` as it stands, with no space put before it."""
        return self._continuation.encode(text)

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of whole documents, bos and eos around each: (tokens,) uint16, or uint32 over 65,536 pieces."""
        dtype = token_dtype(self.vocab_size)
        parts = [_parts(text) if self._spaces_begin_pieces else [text] for text in texts]
        encoded = iter(self._processor.encode([part for text in parts for part in text], num_threads=1))
        bos, eos = [self.bos_id], [self.eos_id]
        return [np.array([*bos, *chain.from_iterable(islice(encoded, len(text))), *eos], dtype) for text in parts]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control pieces have none."""
        return self._processor.decode(ids)

    def byte_id(self, byte: int) -> int:
        """Id of the piece that spells one UTF-8 byte."""
        return self._processor.piece_to_id(f"<0x{byte:02X}>")

    @cached_property
    def _spaces_begin_pieces(self) -> bool:
        """Whether a space only ever begins a piece and one is put before a text, as in Llama's: see `_parts`."""
        model = model_format.ModelProto.FromString(self._processor.serialized_model_proto())
        is_plain = model.normalizer_spec.add_dummy_prefix and not model.normalizer_spec.remove_extra_whitespaces
        return is_plain and all(SPACE not in piece.lstrip(SPACE) for piece in self.pieces)

    @cached_property
    def _continuation(self) -> sentencepiece.SentencePieceProcessor:
        model = model_format.ModelProto.FromString(self._processor.serialized_model_proto())
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _parts(text: str) -> list[str]:
    """A text cut where words begin, so that its parts' ids, one part after the other, are the text's own.

    No piece goes on past a space, and the one that a cut takes away comes back before the next part.
    """
    parts, start = [], 0
    while (cut := WORD_BEGINS.search(text, start + PART_CHARACTERS)) is not None:
        parts.append(text[start : cut.start()])
        start = cut.end()
    return [*parts, text[start:]]


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> Tokenizer:
    """Train a BPE vocabulary of `vocab_size` pieces on `texts` and write its folder; same texts, same bytes.

    Settings are Llama 2's: byte fallback, single digits, runs of spaces as pieces, nothing normalised. All of `texts`
    is held in memory, so give a sample. Raises `ConfigError` when they don't support that many pieces.
    """
    least = len(CONTROL_PIECES) + 256
    require(vocab_size > least, "vocab_size", vocab_size, f"more than the {least} control and byte pieces")
    lines = [line for text in texts for line in _lines(text)]
    require(bool(lines), "tokenizer text", "", "text that is not empty", "look at what curation dropped")
    seen = set().union(*lines)
    lines += [character for character in ROLE_CHARACTERS if character not in seen]  # of none sentencepiece 0.2.2 dies
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            character_coverage=_character_coverage(lines, (vocab_size - least) // 4),
            required_chars=ROLE_CHARACTERS,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _size_error(str(error), vocab_size) or error from error
    return _write_folder(model.getvalue(), folder)


def import_tokenizer(model_file: Path, folder: Path) -> Tokenizer:
    """Make a tokenizer folder from an existing sentencepiece model, such as Llama 2's or Mistral's."""
    require(model_file.is_file(), "tokenizer", str(model_file), "a sentencepiece model file")
    try:
        return _write_folder(model_file.read_bytes(), folder)
    except DecodeError as error:
        raise ConfigError("tokenizer", str(model_file), "a sentencepiece model", str(error)) from None


def _lines(text: str) -> Iterator[str]:
    """Non-empty lines, none longer than the trainer takes. A line break itself stays a byte piece, as in Llama."""
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_LINE_CHARACTERS):
            yield line[start : start + MAX_LINE_CHARACTERS]


def _character_coverage(lines: list[str], max_characters: int) -> float:
    """Share of the running text whose characters become pieces; the rest is spelled in bytes.

    Llama's, or less where that would fill the vocabulary with characters; the trainer takes no less than 0.98.
    """
    counts = Counter(character for line in lines for character in line)
    common = sum(count for _, count in counts.most_common(max_characters))
    return max(0.98, min(0.99995, common / counts.total()))


def _size_error(message: str, vocab_size: int) -> ConfigError | None:
    """Sentencepiece's complaint about the vocabulary's size in our words; None when it complains of something else."""
    if found := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        remedy = "give it more text, or ask for a smaller vocabulary"
        return ConfigError("vocab_size", vocab_size, f"at most {found[1]} for this text", remedy)
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        remedy = "its script has many characters: ask for a larger vocabulary"
        return ConfigError("vocab_size", vocab_size, f"at least {found[1]} for this text", remedy)
    return None


def _write_folder(model: bytes, folder: Path) -> Tokenizer:
    """Write the model, check that it is of the kind everything here relies on, and add the files of transformers."""
    proto = model_format.ModelProto.FromString(model)
    _require_llama_style(proto)
    write_atomically(folder / MODEL_FILE, model)
    write_atomically(folder / "tokenizer.json", _huggingface_tokenizer(proto).to_str(pretty=True))
    unk, bos, eos = CONTROL_PIECES
    config = {
        # The class that takes tokenizer.json as it stands. LlamaTokenizer rebuilds it, and orders merges by id.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)
    return Tokenizer(folder / MODEL_FILE)


def _require_llama_style(proto: Any) -> None:
    """`ConfigError` unless a model encodes as Llama's does, in everything that the rest of the project relies on."""
    pieces, normalizer = proto.pieces, proto.normalizer_spec
    piece_types = model_format.ModelProto.SentencePiece
    ordinary = {piece_types.NORMAL, piece_types.BYTE}
    rules = {
        "model type": proto.trainer_spec.model_type == model_format.TrainerSpec.BPE,
        "pieces 0 to 2": tuple(piece.piece for piece in pieces[:3]) == CONTROL_PIECES,
        "kinds of piece": all(piece.type in ordinary for piece in pieces[3:]),
        "byte fallback": proto.trainer_spec.byte_fallback,
        "space piece": any(piece.piece == SPACE for piece in pieces),
        "dummy prefix": normalizer.add_dummy_prefix,
        "normalisation": normalizer.name == "identity" and not normalizer.remove_extra_whitespaces,
        "spaces inside pieces": all(SPACE not in piece.piece.lstrip(SPACE) for piece in pieces),
    }
    for rule, holds in rules.items():
        allowed = "sentencepiece BPE in the style of Llama 2: <unk> <s> </s>, byte fallback, no normalisation"
        require(holds, "tokenizer", rule, allowed, "train one, or import another")


def _huggingface_tokenizer(proto: Any) -> tokenizers.Tokenizer:
    """The same tokenizer for the `tokenizers` library.

    Sentencepiece joins the pair whose piece has the best score; `tokenizers` the pair that comes first in a list. So
    the list must be ordered by score. Ids won't do: Llama's and Mistral's pieces of spaces stand early and score last.
    """
    pieces, bytes_type = list(proto.pieces), model_format.ModelProto.SentencePiece.BYTE
    ids = {piece.piece: index for index, piece in enumerate(pieces)}
    ranked = sorted(
        (index for index, piece in enumerate(pieces) if index > 2 and piece.type != bytes_type),
        key=lambda index: (-pieces[index].score, index),
    )
    names = [pieces[index].piece for index in ranked]
    merges = [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    unk, bos, _ = CONTROL_PIECES
    model = models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in CONTROL_PIECES])
    return tokenizer
