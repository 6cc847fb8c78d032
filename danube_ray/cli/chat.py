"""`danube chat`: a conversation in the terminal with a model that `danube serve` (or any OpenAI-compatible server) has.

The question of one command line is answered to standard output and that is all; without one a prompt opens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from danube_ray.artifacts import read_json, write_json
from danube_ray.cli.console import Positional, console
from danube_ray.cli.markdown import Stopped, printable, show
from danube_ray.config import ConfigError, require
from danube_ray.data.chat import Message
from danube_ray.inference.http import ChatServer, Usage

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_tokens": int,
    "seed": int,
    "repetition_penalty": float,
}
TITLE_CHARS = 60


def chat(
    prompt: Positional[str | None] = None,
    model: str | None = None,
    url: str = "http://127.0.0.1:8000",
    key: str | None = None,
    system: str = "",
    temperature: float = 0.7,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
    max_tokens: int | None = None,
    seed: int | None = None,
) -> None:
    """Talk to a served model in the terminal.

    With a PROMPT, or text on standard input, one answer; both together make one question. Otherwise a conversation:
    /help lists what can be done in it.

    Args:
        prompt: the question.
        model: the model's name there; None takes the server's first.
        url: the server.
        key: the API key; OPENAI_API_KEY in the environment does as well, and isn't seen by other users.
        system: what the model is told before the conversation.
        temperature: how freely words are drawn; 0 takes the likeliest.
        top_p: below 1, odd words are left out.
        repetition_penalty: above 1, words that were there already become less likely.
        max_tokens: longest answer; None is as long as the context allows.
        seed: the same seed gives the same answer again.
    """
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    server = ChatServer(url, key)
    conversation = Conversation(
        model=server.model(model),
        system=system,
        settings={name: value for name, value in given.items() if value is not None},
    )
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    question = "\n\n".join(text for text in (prompt, piped) if text)
    if question:
        conversation.ask(question)
        show(console, server.stream(conversation.model, conversation.messages, **conversation.settings))
    else:
        require(sys.stdin.isatty(), "question", question, "a PROMPT, text on standard input, or a terminal")
        Chat(server, conversation).run()


@dataclass
class Conversation:
    """What was said, by which model and how; kept as a file from its first answer on."""

    model: str
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    turns: list[Message] = field(default_factory=list)
    began: str = field(default_factory=lambda: time.strftime("%Y-%m-%d-%H%M%S"))

    @property
    def messages(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    @property
    def title(self) -> str:
        first = next((turn["content"] for turn in self.turns), "nothing said yet")
        line = " ".join(first.split())
        return line if len(line) <= TITLE_CHARS else f"{line[: TITLE_CHARS - 1]}…"

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answered(self, answer: str) -> None:
        self.turns.append({"role": "assistant", "content": answer})

    def take_back(self) -> str | None:
        """Forget the last question and its answer; the question, or None where there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None


def history_folder() -> Path:
    """Where conversations are kept: the user's data folder, as the XDG specification has it."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "danube" / "chats"


class Chat:
    """The prompt: what is typed is asked, what begins with / is a command. Ctrl+C stops an answer, Ctrl+D leaves."""

    def __init__(self, server: ChatServer, conversation: Conversation) -> None:
        self.server, self.conversation = server, conversation
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "help": (self.help, "this list"),
            "model": (self.model, "NAME: go on with another model; without a name, the list"),
            "system": (self.system, "TEXT: what the model is told before the conversation; nothing clears it"),
            "set": (self.set, f"NAME VALUE: one of {', '.join(SETTINGS)}; without a value, the server's default"),
            "retry": (self.retry, "another answer to the last question"),
            "edit": (self.edit, "change the last question and ask it again"),
            "copy": (self.copy, "the last answer to the clipboard"),
            "new": (self.new, "a new conversation"),
            "history": (self.history, "earlier conversations"),
            "open": (self.open, "NUMBER: go on with an earlier conversation"),
            "save": (self.save, "FILE: this conversation as JSON"),
            "quit": (self.quit, "leave; Ctrl+D does too"),
        }
        self.draft = ""

    def run(self) -> None:
        """Until the user leaves."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        folder = history_folder()
        folder.mkdir(parents=True, exist_ok=True)
        words = [f"/{name}" for name in self.commands]
        session: PromptSession[str] = PromptSession(
            history=FileHistory(str(folder / "questions")),
            completer=WordCompleter(words, sentence=True),
            complete_while_typing=False,
            key_bindings=keys,
            bottom_toolbar=self.status,
        )
        console.print(
            f"[bold]{self.conversation.model}[/bold] at {self.server.url}. /help lists the commands.", highlight=False
        )
        while True:
            try:
                draft, self.draft = self.draft, ""
                line = session.prompt("> ", default=draft).strip()
            except KeyboardInterrupt:
                continue  # the line is dropped, as in a shell
            except EOFError:
                return
            try:
                self.handle(line)
            except ConfigError as error:
                console.print(f"[bold red]{escape(str(error))}[/bold red]", highlight=False)
            except SystemExit:
                return

    def status(self) -> str:
        settings = " ".join(f"{name}={value}" for name, value in self.conversation.settings.items())
        return f"{self.conversation.model}  {settings}  Esc Enter: new line · Ctrl+C: stop · Ctrl+D: leave"

    def handle(self, line: str) -> None:
        """One line of the user's."""
        if not line:
            return
        if not line.startswith("/"):
            self.conversation.ask(line)
            self.answer()
            return
        name, _, argument = line[1:].partition(" ")
        names = ", ".join(f"/{one}" for one in self.commands)
        require(name in self.commands, "command", f"/{name}", names)
        self.commands[name][0](argument.strip())

    def answer(self) -> None:
        """Stream the answer to the last question. One that fails takes the question back to the prompt."""
        talk, usage = self.conversation, Usage()
        started = time.monotonic()
        pieces = self.server.stream(talk.model, talk.messages, usage, **talk.settings)
        try:
            answer = show(console, pieces)
        except Stopped as stopped:
            answer = stopped.answer
            console.print("[dim]stopped[/dim]")
        except ConfigError:
            self.draft = talk.take_back() or ""
            raise
        seconds = time.monotonic() - started
        if answer.strip():
            talk.answered(answer)
            write_json(history_folder() / f"{talk.began}.json", asdict(talk))
        else:
            self.draft = talk.take_back() or ""
        if usage.completion_tokens:
            end = ", cut off at the longest answer" if usage.finish_reason == "length" else ""
            rate = usage.completion_tokens / seconds
            console.print(f"[dim]{usage.completion_tokens} tokens, {rate:.0f} a second{end}[/dim]", highlight=False)

    def help(self, _: str) -> None:
        table = Table("command", "what it does", box=None)
        for name, (_run, does) in self.commands.items():
            table.add_row(f"/{name}", escape(does))
        console.print(table)

    def model(self, name: str) -> None:
        if not name:
            for one in self.server.models():
                console.print(f"{'*' if one == self.conversation.model else ' '} {one}", highlight=False)
            return
        self.conversation.model = self.server.model(name)

    def system(self, text: str) -> None:
        self.conversation.system = text

    def set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        require(name in SETTINGS, "setting", name, ", ".join(SETTINGS))
        if not value:
            self.conversation.settings.pop(name, None)
            return
        try:
            self.conversation.settings[name] = SETTINGS[name](value)
        except ValueError:
            raise ConfigError(name, value, "a number") from None

    def retry(self, _: str) -> None:
        question = self.conversation.take_back()
        require(question is not None, "conversation", "empty", "one with a question to ask again")
        self.conversation.ask(str(question))
        self.answer()

    def edit(self, _: str) -> None:
        question = self.conversation.take_back()
        require(question is not None, "conversation", "empty", "one with a question to change")
        self.draft = str(question)

    def copy(self, _: str) -> None:
        """By the terminal's own escape sequence (OSC 52): it reaches the clipboard over ssh as well."""
        from base64 import b64encode

        answers = [turn["content"] for turn in self.conversation.turns if turn["role"] == "assistant"]
        require(bool(answers), "conversation", "empty", "one with an answer to copy")
        console.file.write(f"\x1b]52;c;{b64encode(answers[-1].encode()).decode()}\a")
        console.print("[dim]copied, where the terminal allows it[/dim]")

    def new(self, _: str) -> None:
        talk = self.conversation
        self.conversation = Conversation(model=talk.model, system=talk.system, settings=talk.settings)

    def history(self, _: str) -> None:
        kept = kept_conversations()
        for number, talk in enumerate(kept, start=1):
            console.print(f"{number:3}  {talk.began}  {printable(talk.title)}", highlight=False, markup=False)
        if not kept:
            console.print("[dim]nothing kept yet[/dim]")

    def open(self, number: str) -> None:
        kept = kept_conversations()
        require(number.isdigit() and 1 <= int(number) <= len(kept), "conversation", number, f"1 to {len(kept)}")
        self.conversation = kept[int(number) - 1]
        for turn in self.conversation.turns:
            mark = "[bold]> [/bold]" if turn["role"] == "user" else ""
            console.print(f"{mark}{escape(printable(turn['content']))}\n")

    def save(self, file: str) -> None:
        require(bool(file), "file", file, "a path to write to")
        write_json(Path(file), asdict(self.conversation))
        console.print(f"conversation in [bold]{escape(file)}[/bold]")

    def quit(self, _: str) -> None:
        raise SystemExit


def kept_conversations() -> list[Conversation]:
    """Earlier conversations, the newest first; a file that isn't one is passed over."""
    kept = []
    for file in sorted(history_folder().glob("*.json"), reverse=True):
        try:
            kept.append(Conversation(**read_json(file)))
        except (TypeError, ValueError, json.JSONDecodeError):
            continue
    return kept
