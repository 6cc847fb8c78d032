"""Markdown shown while it still comes: whole blocks are printed once and stay, the open one is drawn anew."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without control characters: a model's could move the cursor, or write to the clipboard."""
    return CONTROL.sub("", text)


def split_blocks(text: str) -> tuple[str, str]:
    """The part of `text` that can't change any more, and the open rest: cut at the last blank line outside a fence."""
    cut = 0
    for match in re.finditer(r"\n[ \t]*\n+", text):
        if len(FENCE.findall(text, 0, match.start())) % 2 == 0:
            cut = match.end()
    return text[:cut], text[cut:]


def markdown(text: str) -> RenderableType:
    from rich.markdown import Markdown  # takes a tenth of what `danube --help` may

    return Markdown(text)


def show(console: Console, pieces: Iterable[str]) -> str:
    """Print an answer as it comes, and return it. A KeyboardInterrupt ends it with what was there: see `Stopped`.

    Where the console is no terminal, text goes out as it is, piece by piece.
    """
    answer = ""
    try:
        with _Terminal(console) if console.is_terminal else _Pipe(console) as screen:
            for piece in pieces:
                answer += piece
                screen.add(piece)
    except KeyboardInterrupt:
        raise Stopped(answer) from None
    return answer


class _Pipe:
    """Text as it is."""

    def __init__(self, console: Console) -> None:
        self._file = console.file

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.write("\n")

    def add(self, piece: str) -> None:
        self._file.write(piece)
        self._file.flush()


class _Terminal:
    """Finished blocks as Markdown above, the open one in a live display below."""

    def __init__(self, console: Console) -> None:
        self._console, self._open = console, ""
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=12, transient=True)

    def __enter__(self) -> _Terminal:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        rest, self._open = self._open, ""
        self._live.stop()
        if rest.strip():
            self._console.print(markdown(rest))

    def add(self, piece: str) -> None:
        whole, self._open = split_blocks(self._open + printable(piece))
        if whole:
            self._console.print(markdown(whole))

    def _draw(self) -> RenderableType:
        """The open block; of a long one the end, which is where things happen."""
        room = self._console.width * max(1, self._console.height - 4)
        return markdown(self._open) if len(self._open) < room else Text(self._open[-room // 2 :])


class Stopped(Exception):
    """The user ended an answer early; `answer` is what had come."""

    def __init__(self, answer: str) -> None:
        super().__init__("stopped")
        self.answer = answer
