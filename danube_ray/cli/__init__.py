"""`danube VERB`: one function a verb, its parameters the options, its docstring the help (tyro).

A verb imports its rooms when it runs, so `danube --help` answers at once.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from inspect import cleandoc
from pathlib import Path
from typing import NoReturn

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from danube_ray.artifacts import ArtifactError
from danube_ray.cli.chat import chat
from danube_ray.cli.comparing import compare
from danube_ray.cli.compression import compress
from danube_ray.cli.console import Positional, console, print_report, registry, wide
from danube_ray.cli.data import curate, tokenize, tokenizer
from danube_ray.cli.inspect import inspect
from danube_ray.cli.keys import keys
from danube_ray.cli.models import evaluate, remap
from danube_ray.cli.planning import doctor, plan
from danube_ray.cli.quality import quality
from danube_ray.cli.quantization import quantize
from danube_ray.cli.serving import serve
from danube_ray.cli.trace import trace
from danube_ray.cli.training import dpo, export, pretrain, search, sft
from danube_ray.config import ConfigError, require
from danube_ray.presets import PRESETS

USAGE_ERROR, INTERRUPTED = 2, 128 + 2  # the latter as a shell reports of a process that Ctrl-C ended
# Libraries that warn about themselves whenever transformers loads them: torchao without a GPU's kernels.
NOISY = ("torchao", "torch.utils._pytree")


def demo(text: Path | None = None, out: Path = Path("runs/demo")) -> None:
    """Run the whole pipeline here, in about ten minutes: start here.

    From raw text to a served chat model, on two cores, and on text that every machine with Python has.

    Args:
        text: your own text (a file, a folder, or a folder of one folder a source) instead of Python's documentation.
        out: the run's folder; a second run does only what is missing or changed.
    """
    from danube_ray.cli.training import saved_when_stopped
    from danube_ray.demo.pipeline import Demo

    with saved_when_stopped():
        Demo(out, text, console).run()


def presets() -> None:
    """Print every preset: parameters, tokens, stages and mixtures."""
    from danube_ray.report.units import short_count

    table = Table("preset", "parameters", "tokens", "stage", "sequence", "tokens", "shares, %", box=None)
    for name, preset in PRESETS.items():
        run = preset()
        head, before = [name, f"{run.model.num_parameters:,}", short_count(run.total_tokens)], ""
        for stage in run.stages:
            total = sum(stage.shares.values())
            shares = " ".join(f"{source} {100 * share / total:.1f}" for source, share in stage.shares.items())
            mixture = "the same" if shares == before else shares
            table.add_row(*head, stage.name, f"{stage.sequence_length:,}", short_count(stage.tokens), mixture)
            head, before = ["", "", ""], shares
    wide().print(table)


def report(run: Positional[Path]) -> None:
    """Write a run's report page, report.html in its folder.

    Args:
        run: the folder of a run, of a demo, or of quantized files.
    """
    print_report(run)


# Verbs that begin from a preset: its name first, then any field of it, then the verb's own options.
PRESET_VERBS: dict[str, Callable[..., None]] = {"pretrain": pretrain, "search": search, "plan": plan}
# In the order in which they are used; a docstring's first line is what `danube --help` says of the verb.
VERB_GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "look around": (demo, presets, doctor, plan),
    "data": (curate, inspect, quality, tokenizer, tokenize),
    "train": (pretrain, search, export, remap, sft, dpo),
    "finished models": (evaluate, quantize, compress, serve, keys, chat),
    "finished runs": (report, compare, trace),
}
VERBS = {verb.__name__: verb for verbs in VERB_GROUPS.values() for verb in verbs}


def description(verb: Callable[..., None]) -> str:
    """What a verb says of itself, without its options."""
    return cleandoc(verb.__doc__ or "").partition("\n\nArgs:")[0]


def print_verbs() -> None:
    """The first screen: every verb in a line, 80 columns wide."""
    console.print("usage: danube VERB [OPTIONS]      danube VERB --help lists a verb's options\n", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for group, verbs in VERB_GROUPS.items():
        table.add_row(f"[dim]{group}[/dim]")
        for verb in verbs:
            table.add_row(f"  [bold]{verb.__name__}[/bold]", description(verb).partition("\n")[0])
    console.print(table, highlight=False)


def version() -> str:
    try:
        return metadata.version("danube-ray")
    except metadata.PackageNotFoundError:
        return "from source, not installed"


def known(setting: str, name: str, names: Iterable[str]) -> None:
    """`ConfigError` for a name that isn't one of `names`, with the one that was probably meant."""
    meant = difflib.get_close_matches(name, names, n=1)
    require(name in names, setting, name, f"one of {', '.join(names)}", f"perhaps {meant[0]}" if meant else "")


def run_verb(name: str, arguments: list[str]) -> None:
    if name == "quality":  # the one verb with verbs of its own
        quality(arguments)
        return
    if name not in PRESET_VERBS:
        tyro.cli(VERBS[name], args=arguments, prog=f"danube {name}")
        return
    verb, (preset, *options) = PRESET_VERBS[name], arguments or ["--help"]
    if preset in ("-h", "--help"):
        console.print(f"usage: danube {name} PRESET [OPTIONS]\n\n{description(verb)}\n", highlight=False)
        console.print(f"presets: {', '.join(PRESETS)} (danube presets shows them)\n", highlight=False)
        console.print(f"danube {name} PRESET --help lists every option", highlight=False)
        return
    known("preset", preset, PRESETS)
    begun = functools.partial(verb, run=PRESETS[preset]())
    tyro.cli(begun, args=options, prog=f"danube {name} {preset}", description=description(verb))


def main(argv: list[str] | None = None) -> None:
    """Run a verb; a mistake in the settings or the data is one line and exit status 2."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print_verbs()
        return
    if name in ("-V", "--version"):
        print(f"danube_ray {version()}")
        return
    if name == "--completion":
        script = (Path(__file__).parent / "completion.bash").read_text()
        for marker, names in (("@VERBS@", VERBS), ("@PRESET_VERBS@", PRESET_VERBS), ("@PRESETS@", PRESETS)):
            script = script.replace(marker, " ".join(names))
        print(script, end="")
        return
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        known("verb", name, VERBS)
        with registry:
            run_verb(name, arguments)
    except BrokenPipeError:  # `danube … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        fail(name, "interrupted; what is finished stays, and the same command goes on from it", INTERRUPTED)
    except OSError as error:  # a full disk or a locked folder says its name itself
        fail(name, f"{error.strerror}: {error.filename}" if error.filename else error)
    except (ConfigError, ArtifactError) as error:
        fail(name, error)


def fail(name: str, what: object, status: int = USAGE_ERROR) -> NoReturn:
    message = Text.assemble((f"danube {name}:", "bold red"), f" {what}")
    Console(stderr=True).print(message, highlight=False, soft_wrap=True)
    raise SystemExit(status) from None
