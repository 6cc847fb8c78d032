"""Tokens and their log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from danube_ray.data.tokenizer import SPACE, Tokenizer
from danube_ray.serve.engines import TokenLogprob
from danube_ray.serve.shapes import ChatLogprobs, LikelyToken, TextLogprobs

LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON doesn't have
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token spells; control tokens, and rows of a vocabulary padded beyond its tokenizer, spell nothing."""
    if token in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) or token >= tokenizer.vocab_size:
        return b""
    piece = tokenizer.pieces[token]
    if byte := BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace(SPACE, " ").encode()


def prompt_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a whole prompt, without the space that sentencepiece puts before it."""
    return b"".join(token_bytes(tokenizer, token) for token in ids).decode("utf-8", "replace").removeprefix(" ")


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Each token with the likeliest at its place."""

    def told(token: int, logprob: float) -> LikelyToken:
        return {
            "token": _name(tokenizer, token),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(token_bytes(tokenizer, token)),
        }

    content = [
        {**told(token.id, token.logprob), "top_logprobs": [told(other, logprob) for other, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}  # type: ignore[typeddict-item]


class TextLogprobTeller:
    """The legacy shape, piece by piece: it has to know how many characters stand before each token."""

    def __init__(self, tokenizer: Tokenizer, prompt_start: int | None = None) -> None:
        """`prompt_start` is the first token of a prompt that is echoed: told first, with no log-probability, as OpenAI
        does."""
        self._tokenizer = tokenizer
        self._prompt_start = prompt_start
        self._drops_space = prompt_start is not None  # the one that `prompt_text` drops
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def tell(self, tokens: Sequence[TokenLogprob], num_untold: int = 0) -> TextLogprobs:
        """The next tokens. The likeliest always hold the told one too, as with OpenAI.

        `num_untold` were drawn without the engine saying which: they get places without a value at the end, because
        clients count tokens from there.
        """
        told: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._prompt_start is not None:
            self._add(told, _name(self._tokenizer, self._prompt_start), None, None)
            self._move(self._prompt_start)
            self._prompt_start = None
        for token in tokens:
            likeliest: dict[str, float] = {}
            for other, logprob in (*token.top, (token.id, token.logprob)):  # the best one of two of the same name
                likeliest.setdefault(_name(self._tokenizer, other), max(logprob, LEAST_LOGPROB))
            self._add(told, _name(self._tokenizer, token.id), max(token.logprob, LEAST_LOGPROB), likeliest)
            self._move(token.id)
        for _ in range(num_untold):
            self._add(told, "", None, None)
        return told

    def _add(self, told: TextLogprobs, name: str, logprob: float | None, likeliest: dict[str, float] | None) -> None:
        told["tokens"].append(name)
        told["token_logprobs"].append(logprob)
        told["top_logprobs"].append(likeliest)
        told["text_offset"].append(self._offset)

    def _move(self, token: int) -> None:
        spelled = self._characters.decode(token_bytes(self._tokenizer, token))
        if self._drops_space and spelled:
            self._drops_space = False
            spelled = spelled.removeprefix(" ")
        self._offset += len(spelled)


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token in text. Bytes that are only a part of a character are spelled as OpenAI does, so that none are alike."""
    spelled = token_bytes(tokenizer, token)
    if not spelled:
        return tokenizer.pieces[token] if token < tokenizer.vocab_size else ""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
