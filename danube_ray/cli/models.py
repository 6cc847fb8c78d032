"""Verbs for a finished model: remap, evaluate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

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
    """Carry a model over to another tokenizer, to train it further.

    `danube pretrain --init-from` goes on with it. Rows of embedding and head follow their piece; all other weights
    stay. The defaults are Danube2's: pieces that are new begin at random, the sliding window is turned off, the context
    is 8,192 tokens.

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
    gpus_per_worker: float = 0,
    limit: int | None = None,
) -> None:
    """Score a model: tasks by lm-eval, perplexity on held-out tokens.

    Args:
        model: the Hugging Face folder.
        tasks: NAME=FILE each, rows {"question", "choices", "answer"} as JSON lines or a JSON list.
        tokens: a tokens folder; its held-out part is scored.
        out: where results go.
        num_workers: Ray actors that share the tasks' requests, each with a copy of the model.
        gpus_per_worker: GPUs of each, such as 1 or 0.5; 0 computes on CPUs.
        limit: documents a task.
    """
    import torch

    from danube_ray.artifacts import write_json
    from danube_ray.evaluate.harness import multiple_choice_task
    from danube_ray.evaluate.perplexity import held_out_perplexity
    from danube_ray.runtime.evaluation import evaluate as run_tasks

    require(bool(tasks) or tokens is not None, "--tasks and --tokens", "neither", "one or both")
    require((model / "config.json").is_file(), "model", str(model), "a Hugging Face folder, with its config.json")
    require(limit is None or limit > 0, "--limit", limit, "at least 1")
    require(num_workers > 0, "--num-workers", num_workers, "at least 1")
    require(gpus_per_worker >= 0, "--gpus-per-worker", gpus_per_worker, "0 or more")
    loaded = [multiple_choice_task(*pair) for pair in named_paths(tasks).items()] if tasks else []
    if tokens is not None:
        device = "cuda" if gpus_per_worker and torch.cuda.is_available() else "cpu"  # a cluster's head may have none
        by_source = held_out_perplexity(model, tokens, device=device)
        for source, result in by_source.items():
            console.print(f"{source}: perplexity {result.value:.2f} ± {result.error:.2f} on {result.tokens:,} tokens")
        write_json(out / "perplexity.json", {name: dataclasses.asdict(result) for name, result in by_source.items()})
    if loaded:
        rows = run_tasks(
            model, loaded, out / "results.json", num_workers=num_workers, gpus_per_worker=gpus_per_worker, limit=limit
        )
        for row in rows:
            console.print(
                f"{row['task']} {row['metric']}: {row['value']:.3f} ± {row['stderr'] or 0:.3f} (n={row['n']})"
            )
    console.print(f"results in [bold]{out}[/bold]")
