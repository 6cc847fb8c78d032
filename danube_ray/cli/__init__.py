"""`danube VERB`: one function a verb, its parameters the options, its docstring the help (tyro).

A verb imports its rooms when it runs, so `danube --help` answers at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from danube_ray.artifacts import ArtifactError
from danube_ray.cli.chat import chat
from danube_ray.cli.comparing import compare
from danube_ray.cli.compression import compress
from danube_ray.cli.console import Positional, console, print_report, registry
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

USAGE_ERROR = 2


def demo(text: Path | None = None, out: Path = Path("runs/demo")) -> None:
    """Run the whole pipeline on this machine, from raw text to a served chat model: about ten minutes on two cores.

    Args:
        text: your own text (a file, a folder, or a folder of one folder a source) instead of Python's documentation.
        out: the run's folder; a second run does only what is missing or changed.
    """
    from danube_ray.demo.pipeline import Demo

    Demo(out, text, console).run()


def presets() -> None:
    """Print every preset: parameters, tokens, and the stages with their sequence lengths and mixtures."""
    table = Table("preset", "parameters", "tokens", "stage", "sequence", "tokens", "shares, %", box=None)
    for name, preset in PRESETS.items():
        run = preset()
        head = [name, f"{run.model.num_parameters:,}", f"{run.total_tokens:,}"]
        for stage in run.stages:
            total = sum(stage.shares.values())
            shares = " ".join(f"{source} {100 * share / total:.1f}" for source, share in stage.shares.items())
            table.add_row(*head, stage.name, f"{stage.sequence_length:,}", f"{stage.tokens:,}", shares)
            head = ["", "", ""]
    Console(width=max(console.width, 160)).print(table)


def report(run: Positional[Path]) -> None:
    """Write a run's report page from its artifacts."""
    print_report(run)


# Verbs that begin from a preset: its name first, then any field of it, then the verb's own options.
PRESET_VERBS: dict[str, Callable[..., None]] = {"pretrain": pretrain, "search": search, "plan": plan}
VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "presets": presets,
    "curate": curate,
    "inspect": inspect,
    "quality": quality,
    "tokenizer": tokenizer,
    "tokenize": tokenize,
    "plan": plan,
    "pretrain": pretrain,
    "search": search,
    "export": export,
    "remap": remap,
    "sft": sft,
    "dpo": dpo,
    "evaluate": evaluate,
    "quantize": quantize,
    "compress": compress,
    "serve": serve,
    "keys": keys,
    "chat": chat,
    "report": report,
    "compare": compare,
    "trace": trace,
    "doctor": doctor,
}


def run_verb(name: str, arguments: list[str]) -> None:
    if name == "quality":  # the one verb with verbs of its own
        quality(arguments)
        return
    if name not in PRESET_VERBS:
        tyro.cli(VERBS[name], args=arguments, prog=f"danube {name}")
        return
    preset, *options = arguments or ["--help"]
    if preset in ("-h", "--help"):
        console.print(f"usage: danube {name} PRESET [OPTIONS]\n\n{PRESET_VERBS[name].__doc__}\n")
        console.print(f"presets: {', '.join(PRESETS)}\ndanube {name} PRESET --help lists every option")
        return
    require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    verb = functools.partial(PRESET_VERBS[name], run=PRESETS[preset]())
    tyro.cli(verb, args=options, prog=f"danube {name} {preset}", description=PRESET_VERBS[name].__doc__)


def main(argv: list[str] | None = None) -> None:
    """Run a verb; a mistake in the settings or the data is one line and exit status 2."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        table = Table("verb", "what it does", box=None, title="danube VERB --help lists a verb's options")
        for verb, function in VERBS.items():
            table.add_row(f"[bold]{verb}[/bold]", (function.__doc__ or "").split("\n")[0].split(": `")[0])
        console.print(table)
        return
    try:
        require(name in VERBS, "verb", name, f"one of {', '.join(VERBS)}")
        with registry:
            run_verb(name, arguments)
    except (ConfigError, ArtifactError, OSError) as error:  # a full disk or a locked folder says its name itself
        Console(stderr=True).print(f"[bold red]danube {name}:[/bold red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(USAGE_ERROR) from None
