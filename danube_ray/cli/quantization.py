"""`danube quantize`: GGUF files of a model, what each level costs, and which level to take.

GGUF is for llama.cpp; `danube compress` makes FP8 and 4-bit folders for GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from danube_ray.artifacts import content_hash, file_hash, read_json
from danube_ray.cli.comparison import DEFAULT_CONTEXT, Comparison, read_ids
from danube_ray.cli.console import Positional, console
from danube_ray.config import ModelConfig, require
from danube_ray.report.units import size

if TYPE_CHECKING:
    import numpy as np

    from danube_ray.quantize.estimate import LevelSize
    from danube_ray.quantize.levels import Level
    from danube_ray.quantize.table import Row
    from danube_ray.runtime.measuring import Meter, OnProgress

CALIBRATION_TOKENS = 32_768


def quantize(
    model: Positional[str],
    on: Annotated[Comparison, tyro.conf.arg(name="")],
    levels: tuple[str, ...] = (),
    estimate: bool = False,
    target_size: str | None = None,
    max_kld: float | None = None,
    imatrix: Path | None = None,
    calibration: Path | None = None,
    threads: int = 0,
    out: Path = Path("runs/gguf"),
) -> None:
    """Write GGUF files of a model, and what each level costs.

    Or pick a level by its size or divergence. Quality is measured against the float model, on --tokens or --text;
    without them files are made and timed. A level that is there already is neither made nor measured again.

    Args:
        model: a Hugging Face folder, Llama or Mistral; for --estimate also the name of a preset.
        levels: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 Q3_K_M Q2_K. Default: F16 Q8_0 Q4_K_M; all of them to
            estimate or pick from.
        estimate: only say how large the files, and the memory to run them, will be. No weight is read.
        target_size: make the best level whose file is at most this large, such as 2.5GB.
        max_kld: make the smallest file whose mean KL divergence from the float model is at most this, such as 0.01.
        imatrix: an importance matrix, llama.cpp's or ours, so that rounding spares what counts.
        calibration: a text file, or a tokens folder (its training part), to gather an importance matrix on.
        threads: CPUs to work on, and to time each level on; 0 takes all.
        out: where the files, quantization.json and report.html go.
    """
    from danube_ray.cli.levels import print_estimate
    from danube_ray.quantize.estimate import estimate as estimated
    from danube_ray.quantize.estimate import model_of
    from danube_ray.quantize.levels import DEFAULT_LEVELS, LEVELS, check_level
    from danube_ray.quantize.table import fitting, parse_size

    offered: Sequence[Level] = [check_level(level) for level in dict.fromkeys(levels)] or LEVELS
    require(target_size is None or max_kld is None, "--target-size and --max-kld", "both", "one of them")
    require(max_kld is None or max_kld > 0, "--max-kld", max_kld, "greater than 0")
    require(imatrix is None or calibration is None, "--imatrix and --calibration", "both", "one of them")
    require(threads >= 0, "--threads", threads, "0 or more")
    config, tied = model_of(model)
    longest = config.usable_context
    allowed = f"2 to {longest}, which llama.cpp can use of this model"
    require(on.context is None or on.context <= longest, "--context", on.context, allowed)
    facts = {"tied_embeddings": tied, "with_importance": bool(imatrix or calibration)}
    sizes = estimated(config, offered, context=on.context, **facts)
    if estimate:
        print_estimate(model, sizes, on.context or longest)
        return
    target_bytes = parse_size(target_size) if target_size else 0
    fits = fitting(sizes, target_bytes) if target_size else []
    require(max_kld is None or on.place is not None, "--max-kld", max_kld, "used with --tokens or --text")
    remedy = "a matrix makes its own text look better than others"
    same = calibration is not None and calibration == on.text
    require(not same, "--calibration", calibration, "another text than --text", remedy)
    with bench(Path(model), config, on, imatrix, calibration, threads, out) as made:
        if target_size:
            chosen = made.largest_within(target_bytes, fits)
        elif max_kld is not None:
            chosen = made.smallest_within(max_kld, sizes)
        else:
            made.make(offered if levels else DEFAULT_LEVELS)
            chosen = ""
    tell(out, on, chosen)


def tell(out: Path, on: Comparison, chosen: str) -> None:
    """The table, which level was chosen and why, and where the report lies."""
    from danube_ray.cli.levels import print_table
    from danube_ray.report.page import write_report
    from danube_ray.report.run import QUANTIZATION

    print_table(read_json(out / QUANTIZATION))
    if on.place is None:
        console.print("[dim]--text FILE or --tokens FOLDER adds what each level costs in quality[/dim]")
    if chosen:
        console.print(chosen, soft_wrap=True, highlight=False)
    console.print(f"report [bold]{write_report(out)}[/bold]", soft_wrap=True)


@contextmanager
def bench(
    folder: Path,
    config: ModelConfig,
    on: Comparison,
    imatrix: Path | None,
    calibration: Path | None,
    threads: int,
    out: Path,
) -> Iterator[Bench]:
    """A cluster, progress bars, and what makes and measures levels there; what is wrong is said before it starts."""
    from danube_ray.quantize.gguf import require_convertible
    from danube_ray.quantize.imatrix import ImportanceMatrix
    from danube_ray.runtime.measuring import Meter
    from danube_ray.runtime.session import session

    require((folder / "config.json").is_file(), "model", str(folder), "a Hugging Face folder; a preset has no weights")
    material = on.material(folder, config)
    ids = read_ids(calibration, folder, CALIBRATION_TOKENS, held_out=False) if calibration else None
    require_convertible(folder, ImportanceMatrix.read(imatrix) if imatrix else None)
    out.mkdir(parents=True, exist_ok=True)
    require(os.access(out, os.W_OK), "--out", str(out), "a folder that can be written")
    num_threads = threads or len(os.sched_getaffinity(0))
    with session(num_threads), progress() as on_progress:
        if ids is not None:
            imatrix = gather(folder, config, ids, str(calibration), out, num_threads, on_progress)
        yield Bench(folder, out, imatrix, Meter(folder, out, material, num_threads, on_progress), on_progress)


@dataclass
class Bench:
    """Makes and measures levels of one model, all at once or until one will do."""

    folder: Path
    out: Path
    imatrix: Path | None
    meter: Meter
    on_progress: OnProgress

    def files(self, levels: Sequence[Level]) -> list[Row]:
        """The rows of these levels, whose files are there."""
        from danube_ray.runtime.quantization import quantize as convert

        what = f"writing {', '.join(levels) if len(levels) <= 3 else f'{len(levels)} levels'}"
        rows = convert(
            self.folder,
            self.out,
            levels,
            imatrix=self.imatrix,
            on_progress=lambda done, spans: self.on_progress(what, done, spans),
        )
        return [row for row in rows if row["level"] in levels]

    def make(self, levels: Sequence[Level]) -> list[Row]:
        """The rows of these levels, measured."""
        self.files(levels)
        return self.meter.measure(levels)

    def largest_within(self, target_bytes: int, fits: Sequence[Level]) -> str:
        """Make the first of the levels that should fit, best first, whose file really is at most that large."""
        from danube_ray.quantize.table import nothing_fits

        over: list[Row] = []
        for level in fits:
            (row,) = self.files([level])
            if row["bytes"] <= target_bytes:
                self.make([level])
                return f"chosen [bold]{self.out / row['file']}[/bold]: {size(row['bytes'])}, the most bits within " \
                    f"{size(target_bytes)}"  # fmt: skip
            over.append(row)
        smallest = min(over, key=lambda row: row["bytes"])
        raise nothing_fits(target_bytes, smallest["level"], smallest["bytes"])

    def smallest_within(self, max_kld: float, sizes: Sequence[LevelSize]) -> str:
        """Make levels from the smallest upward until one's mean KL divergence is at most that."""
        from danube_ray.quantize.table import within

        tried: list[Row] = []
        for each in sorted(sizes, key=lambda each: each.bytes):
            tried += self.make([each.level])
            if tried[-1]["kld_mean"] <= max_kld:
                break
        row = within(tried, max_kld)
        seen = ", ".join(f"{row['level']} {row['kld_mean']:.2g}" for row in tried)
        return f"chosen [bold]{self.out / row['file']}[/bold]: {size(row['bytes'])}, the smallest with a mean KL " \
            f"divergence of at most {max_kld:g} (tried from the smallest: {seen})"  # fmt: skip


def gather(
    folder: Path,
    config: ModelConfig,
    ids: np.ndarray,
    dataset: str,
    out: Path,
    num_threads: int,
    on_progress: OnProgress,
) -> Path:
    """The importance matrix on `ids`, beside the files; one that is there from the same inputs is taken."""
    from danube_ray.runtime.quantization import gather_imatrix

    weights = {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}
    context = min(DEFAULT_CONTEXT, config.usable_context)
    file = out / f"imatrix-{content_hash([weights, ids.tolist(), context])[:12]}.gguf"
    if not file.is_file():
        on_progress("gathering the importance matrix", 0, 1)
        gather_imatrix(folder, ids, file, dataset=dataset, context=context, num_threads=num_threads)
        on_progress("gathering the importance matrix", 1, 1)
    return file


@contextmanager
def progress() -> Iterator[OnProgress]:
    """A bar for each thing that is being done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        shown: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            task = shown[what] if what in shown else shown.setdefault(what, bars.add_task(what, total=total))
            bars.update(task, completed=done, total=total)

        yield update
