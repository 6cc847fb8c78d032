"""Verbs for a finished model: remap, evaluate, quantize, serve, chat."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from rich.table import Table

from danube_ray.cli.console import Positional, console, named_paths
from danube_ray.config import require


def remap(
    model: Positional[Path],
    new_tokenizer: Path,
    out: Path,
    old_tokenizer: Path | None = None,
    new_rows: Literal["random", "mean"] = "random",
    context_length: int = 8_192,
    sliding_window: int | None = None,
    seed: int = 1234,
) -> None:
    """Carry a Hugging Face folder over to another tokenizer, so that `danube pretrain --init-from` goes on with it.

    Rows of embedding and head follow their piece; all other weights stay. The defaults are Danube2's: pieces that are
    new begin at random, the sliding window is turned off, the context is 8,192 tokens.

    Args:
        model: the Hugging Face folder.
        new_tokenizer: the folder of the tokenizer to change to.
        out: the Hugging Face folder to write.
        old_tokenizer: the folder or file of the tokenizer that the model was trained with, where MODEL has none.
        new_rows: draw the rows of new pieces at random, or take the mean of the old pieces that spell them.
        context_length: the longest sequence from now on.
        sliding_window: the attention window from now on; None turns it off.
        seed: of the rows drawn at random.
    """
    from danube_ray.train import remap as vocabulary

    manifest = vocabulary.remap(
        model,
        new_tokenizer,
        out,
        old_tokenizer=old_tokenizer,
        new_rows=new_rows,
        context_length=context_length,
        sliding_window=sliding_window,
        seed=seed,
    )
    console.print(f"{manifest['rows_copied']:,} rows copied, {manifest['rows_new']:,} new ({manifest['new_rows']})")
    console.print(f"model in [bold]{out}[/bold]: go on with `danube pretrain PRESET --init-from {out}`", soft_wrap=True)


def evaluate(
    model: Positional[Path],
    tasks: tuple[str, ...] = (),
    tokens: Path | None = None,
    out: Path = Path("runs/evaluation"),
    num_workers: int = 1,
    limit: int | None = None,
) -> None:
    """Score a Hugging Face folder: multiple-choice tasks by lm-eval, perplexity on held-out tokens.

    Args:
        model: the Hugging Face folder.
        tasks: NAME=FILE each, rows {"question", "choices", "answer"} as JSON lines or a JSON list.
        tokens: a tokens folder; its held-out part is scored.
        out: where results go.
        num_workers: Ray actors that share the requests, each with a copy of the model.
        limit: documents a task.
    """
    from danube_ray.artifacts import write_json
    from danube_ray.evaluate.harness import multiple_choice_task
    from danube_ray.evaluate.perplexity import held_out_perplexity
    from danube_ray.runtime.evaluation import evaluate as run_tasks

    require(bool(tasks) or tokens is not None, "--tasks and --tokens", None, "one or both")
    if tokens is not None:
        by_source = held_out_perplexity(model, tokens)
        for source, result in by_source.items():
            console.print(f"{source}: perplexity {result.value:.2f} ± {result.error:.2f} on {result.tokens:,} tokens")
        write_json(out / "perplexity.json", {name: dataclasses.asdict(result) for name, result in by_source.items()})
    if tasks:
        loaded = [multiple_choice_task(name, file) for name, file in named_paths(tasks).items()]
        rows = run_tasks(model, loaded, out / "results.json", num_workers=num_workers, limit=limit)
        for row in rows:
            console.print(
                f"{row['task']} {row['metric']}: {row['value']:.3f} ± {row['stderr'] or 0:.3f} (n={row['n']})"
            )
    console.print(f"results in [bold]{out}[/bold]")


def quantize(
    model: Positional[Path],
    tokens: Path,
    out: Path = Path("runs/gguf"),
    levels: tuple[str, ...] = ("F16", "Q8_0", "Q4_K_M"),
    num_tokens: int = 32_768,
) -> None:
    """Write GGUF files of a Hugging Face folder and the table of what each level costs.

    Args:
        model: the Hugging Face folder.
        tokens: a tokens folder; levels are compared on its held-out part.
        out: where the files and quantization.json go.
        levels: GGUF levels.
        num_tokens: held-out tokens to compare on.
    """
    from danube_ray.data.shards import held_out_tokens
    from danube_ray.quantize.levels import Level, check_level
    from danube_ray.runtime import quantization

    wanted: list[Level] = [check_level(level) for level in levels]
    rows = quantization.quantize(model, out, held_out_tokens(tokens, num_tokens), wanted)
    table = Table("level", "MiB", "bits/weight", "perplexity", "KLD mean", "KLD p99", "same top", "tokens/s", box=None)
    for row in rows:
        table.add_row(
            row["level"],
            f"{row['bytes'] / 2**20:,.2f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.3f} ± {row['perplexity_error']:.3f}",
            f"{row['kld_mean']:.5f}",
            f"{row['kld_p99']:.4f}",
            f"{row['same_top']:.2%}",
            f"{row['tokens_per_s']:,.0f}",
        )
    console.print(table)


def serve(
    models: Positional[tuple[str, ...]],
    tokenizer: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    min_replicas: int = 1,
    max_replicas: int = 1,
    num_slots: int = 4,
    num_threads: int = 2,
) -> None:
    """Serve GGUF models on Ray Serve: the OpenAI API under /v1, a chat page at /.

    Args:
        models: NAME=FILE.gguf each.
        tokenizer: the folder whose tokenizer and chat template the models were trained with.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        min_replicas: engines kept of each model; 0 unloads an idle one.
        max_replicas: engines of each model under load.
        num_slots: answers that an engine generates at the same time.
        num_threads: CPUs of an engine.
    """
    from danube_ray.config import ServeConfig, ServedModel
    from danube_ray.runtime import serving

    scale = {"min_replicas": min_replicas, "max_replicas": max_replicas}
    served = {
        name: ServedModel(
            weights=file, tokenizer_folder=tokenizer, num_slots=num_slots, num_threads=num_threads, **scale
        )
        for name, file in named_paths(models).items()
    }
    serving.serve(ServeConfig(models=served, host=host, port=port))


def chat(prompt: Positional[str], model: str, url: str = "http://127.0.0.1:8000", max_tokens: int = 256) -> None:
    """Ask a served model one question.

    Args:
        prompt: the question.
        model: the model's name there.
        url: the server.
        max_tokens: longest answer.
    """
    from danube_ray.inference.http import chat as ask

    console.print(ask(url, model, prompt, max_tokens=max_tokens), markup=False, highlight=False)
