"""`danube demo`: the whole pipeline on one machine, from raw text to an answer of a served chat model.

Each step is what the verb of its name does on a cluster; only the sizes differ. A run folder holds every artifact on
the way, so a second run does only what is missing or changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.table import Table

from danube_ray.artifacts import read_json, read_json_lines, read_manifest, write_json
from danube_ray.config import DpoConfig, FinetuneConfig, LoraConfig, OptimizerConfig, RunConfig, require, to_dict
from danube_ray.demo.steps import Steps
from danube_ray.presets import PRESETS
from danube_ray.report.page import write_report

if TYPE_CHECKING:
    from danube_ray.config import ServedModel
    from danube_ray.quantize.levels import Level
    from danube_ray.train.progress import Progress

CORPUS_BYTES_PER_SOURCE = 4 * 2**20
TOKENIZER_BYTES = 4 * 2**20
SEARCH_TOKENS = 65_536
LEVELS: tuple[Level, ...] = ("F16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0")
KLD_TOKENS = 8_192
QUESTIONS = ("What does json.loads do?", "What is os.path.join for?", "Describe textwrap.dedent.")
CHAT_MODEL = "danube-nano-chat"


class Demo:
    """One run of the pipeline under `root`. `text` None takes what every machine with Python has."""

    def __init__(self, root: Path, text: Path | None, console: Console) -> None:
        require(text is None or text.exists(), "--text", str(text), "a file or folder that exists")
        self.root, self.text, self.console = root.resolve(), text, console
        self.cluster = ExitStack()
        self.steps = Steps(self.root, console)

    def run(self) -> None:
        """Every step in order; then the report, the table and the command that serves the model."""
        with ExitStack() as self.cluster:
            self.run_steps()
        report = write_report(self.root)
        self.console.print(self.table())
        self.say_what_next(report)

    def run_steps(self) -> None:
        step, preset = self.steps.run, PRESETS["nano"]()
        source = str(self.text) if self.text else "python"
        step("text", "Collect text", [source, CORPUS_BYTES_PER_SOURCE], self.collect)
        step("documents", "Curate documents", [], self.curate)
        step("tokenizer", "Train the tokenizer", preset.model.vocab_size, self.train_tokenizer)
        step("tokens", "Write token shards", [], self.tokenize)
        step("search", "Search a proxy's settings", SEARCH_TOKENS, self.search)
        step("pretrain", "Pretrain in three stages", settings(preset), self.pretrain)
        step("model", "Export to a Hugging Face folder", [], self.export)
        step("sft", "Fine-tune on instructions", settings(self.sft_config()), self.sft)
        step("dpo", "Align on preferences (DPO, LoRA)", settings(self.dpo_config()), self.dpo)
        step("evaluation", "Evaluate", [], self.evaluate)
        step("gguf", "Quantize", LEVELS, self.quantize)
        step("samples.json", "Serve and ask", QUESTIONS, self.ask)

    def start_ray(self) -> None:
        """Start the cluster that the steps share, when the first of them needs it."""
        from danube_ray.runtime.session import session

        self.cluster.enter_context(session())

    # Data

    def collect(self) -> dict[str, Any]:
        from danube_ray.demo.corpus import collect

        facts = collect(self.root / "text", CORPUS_BYTES_PER_SOURCE, self.text)
        sizes = {source: f"{size / 2**20:.1f} MiB" for source, size in facts.source_bytes.items()}
        return {**sizes, "instructions": facts.instructions, "preferences": facts.preferences}

    @property
    def sources(self) -> dict[str, Path]:
        """Folders of raw text, the cleanest first: of two equal documents the cleaner source keeps its copy."""
        folders = {path.name: path for path in sorted((self.root / "text" / "sources").iterdir())}
        cleanest_first = [name for name in ("stdlib", "docs", "web") if name in folders]
        return {name: folders[name] for name in [*cleanest_first, *sorted(folders.keys() - set(cleanest_first))]}

    def curate(self) -> dict[str, Any]:
        from danube_ray.demo.corpus import DOCUMENTATION_SETTINGS
        from danube_ray.runtime.curation import curate

        self.start_ray()
        with self.bar("curating") as on_progress:
            counts = curate(
                self.sources,
                self.root / "documents",
                DOCUMENTATION_SETTINGS,
                lambda step, done, total: on_progress(done, total),
            )["counts"]
        return {fact: sum(source[fact] for source in counts.values()) for fact in ("read", "kept", "dropped")}

    def train_tokenizer(self) -> dict[str, Any]:
        from danube_ray.runtime.tokenization import train_tokenizer_on

        vocab_size = PRESETS["nano"]().model.vocab_size
        train_tokenizer_on(self.root / "documents", self.root / "tokenizer", vocab_size, max_bytes=TOKENIZER_BYTES)
        return {"pieces": vocab_size}

    def tokenize(self) -> dict[str, Any]:
        from danube_ray.runtime.tokenization import tokenize

        self.start_ray()
        with self.bar("tokenizing") as on_progress:
            tokenize(self.root / "documents", self.root / "tokenizer", self.root / "tokens", on_progress=on_progress)
        return {source: f"{tokens:,} tokens" for source, tokens in self.token_counts().items()}

    def token_counts(self) -> dict[str, int]:
        counts = read_manifest(self.root / "tokens")["counts"]
        return {source: sum(store["tokens"] for store in buckets.values()) for source, buckets in counts.items()}

    # Training

    def preset(self) -> RunConfig:
        """The nano preset on this run's tokens. The user's own text is mixed as it comes, and read 4 times at most."""
        run = PRESETS["nano"]()
        counts = self.token_counts()
        if counts.keys() != run.stages[0].shares.keys():
            total = sum(counts.values())
            shares = {source: max(1, round(1000 * tokens / total)) for source, tokens in counts.items()}
            scale = min(1.0, 0.9 * run.max_epochs * total / run.total_tokens)
            stages = [replace(stage, shares=shares, tokens=round(scale * stage.tokens)) for stage in run.stages]
            run = replace(run, stages=tuple(stages))
        loop = replace(run.loop, cpus_per_worker=threads())
        return replace(run, name="pretrain", loop=loop, tokens_dir=str(self.root / "tokens"), output_dir=str(self.root))

    def search(self) -> dict[str, Any]:
        from danube_ray.runtime.tuning import search
        from danube_ray.search.proxies import proxy
        from danube_ray.search.studies import Study

        self.start_ray()
        run = self.preset()
        loop = replace(run.loop, cpus_per_worker=1)
        small = proxy(replace(run, loop=loop), "proxy", run.model, SEARCH_TOKENS)
        study = Study(ranges={"optimizer.learning_rate": (1e-3, 8e-3)}, num_trials=2, max_concurrent=2)
        best, *_ = search(small, study, self.root / "search")
        return {"trials": study.num_trials, "best learning rate": f"{best.config['optimizer.learning_rate']:.2e}"}

    def pretrain(self) -> dict[str, Any]:
        from danube_ray.runtime.training import pretrain
        from danube_ray.search.studies import read_trials

        self.start_ray()
        run = self.preset()
        best, *_ = read_trials(self.root / "search")
        rate = best.config["optimizer.learning_rate"]
        optimizer = replace(run.optimizer, learning_rate=rate, min_learning_rate=rate / 20)
        pretrain(replace(run, optimizer=optimizer), self.progress())
        return {
            "parameters": f"{run.model.num_parameters:,}",
            "tokens": f"{run.total_tokens:,}",
            "validation loss": f"{self.validation_loss():.3f}",
        }

    def export(self) -> dict[str, Any]:
        from danube_ray.train.checkpoint import newest_verified
        from danube_ray.train.export import export_checkpoint

        checkpoint = newest_verified(self.root / "pretrain" / "checkpoints")
        assert checkpoint is not None  # the step before has committed it
        export_checkpoint(checkpoint, PRESETS["nano"]().model, self.root / "tokenizer", self.root / "model")
        return {"checkpoint": checkpoint.name}

    def sft_config(self) -> FinetuneConfig:
        run = PRESETS["nano"]()
        return FinetuneConfig(
            name="sft",
            base=str(self.root / "model"),
            data=str(self.root / "text" / "instructions.jsonl"),
            epochs=2,
            batch_size=32,
            micro_batch_size=32,
            max_length=128,
            optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=0.0, warmup_steps=10),
            loop=replace(run.loop, cpus_per_worker=threads(), log_every_steps=2),
            output_dir=str(self.root),
        )

    def sft(self) -> dict[str, Any]:
        from danube_ray.posttrain.finetune import export
        from danube_ray.runtime.training import sft

        self.start_ray()
        config = self.sft_config()
        export(sft(config, self.progress()), config, self.root / "sft" / "model")
        return self.train_loss("sft")

    def dpo_config(self) -> DpoConfig:
        run = PRESETS["nano"]()
        return DpoConfig(
            name="dpo",
            base=str(self.root / "sft" / "model"),
            data=str(self.root / "text" / "preferences.jsonl"),
            batch_size=8,
            micro_batch_size=8,
            max_length=128,
            lora=LoraConfig(rank=4, alpha=16),
            optimizer=OptimizerConfig(learning_rate=5e-4, min_learning_rate=0.0, warmup_steps=4, weight_decay=0.0),
            loop=replace(run.loop, cpus_per_worker=threads(), log_every_steps=2),
            output_dir=str(self.root),
        )

    def dpo(self) -> dict[str, Any]:
        from danube_ray.posttrain.finetune import export
        from danube_ray.runtime.training import dpo

        self.start_ray()
        config = self.dpo_config()
        export(dpo(config, self.progress()), config, self.root / "chat")
        return self.train_loss("dpo")

    def metrics(self, name: str, kind: str) -> list[dict[str, Any]]:
        rows = read_json_lines(self.root / name / "metrics.jsonl")
        return [row for row in rows if row["kind"] == kind]

    def train_loss(self, name: str) -> dict[str, Any]:
        rows = self.metrics(name, "train")
        return {"steps": rows[-1]["step"], "loss": f"{rows[0]['loss']:.3f} → {rows[-1]['loss']:.3f}"}

    def validation_loss(self) -> float:
        return self.metrics("pretrain", "validation")[-1]["loss"]

    # After training

    def evaluate(self) -> dict[str, Any]:
        """The loss against what counting tokens alone would reach, and a multiple-choice task by lm-eval."""
        from danube_ray.data.shards import held_out_tokens
        from danube_ray.evaluate.harness import multiple_choice_task
        from danube_ray.evaluate.perplexity import unigram_entropy
        from danube_ray.runtime.evaluation import evaluate

        self.start_ray()
        loss, entropy = self.validation_loss(), unigram_entropy([held_out_tokens(self.root / "tokens")])
        facts = {"validation_loss": loss, "unigram_entropy": entropy, "improvement": 1 - loss / entropy}
        write_json(self.root / "evaluation" / "perplexity.json", facts)
        task = multiple_choice_task("python_summaries", self.root / "text" / "questions.jsonl")
        rows = evaluate(self.root / "chat", [task], self.root / "evaluation" / "results.json")
        accuracy = next(row for row in rows if row["metric"] == "acc_norm")
        return {
            "validation loss": f"{loss:.3f} nats",
            "unigram entropy": f"{entropy:.3f} nats",
            "below it": f"{facts['improvement']:.1%}",
            "multiple choice": f"{accuracy['value']:.1%} (chance 25 %)",
        }

    def quantize(self) -> dict[str, Any]:
        """GGUF files of some levels, and how far each one's predictions are from the float model's."""
        from danube_ray.data.shards import held_out_tokens
        from danube_ray.quantize.measure import passages
        from danube_ray.runtime.measuring import Material, Meter
        from danube_ray.runtime.quantization import quantize

        self.start_ray()
        chat, gguf = self.root / "chat", self.root / "gguf"
        texts = passages(held_out_tokens(self.root / "tokens", at_most=KLD_TOKENS), context=256)
        with self.bar("quantizing") as on_progress:
            quantize(chat, gguf, LEVELS, on_progress=on_progress)
            meter = Meter(chat, gguf, Material(texts), on_progress=lambda _, done, total: on_progress(done, total))
            rows = meter.measure(LEVELS)
        return {row["level"]: f"{row['bytes'] / 2**20:.2f} MiB, KLD {row['kld_mean']:.4f}" for row in rows}

    def served(self) -> ServedModel:
        from danube_ray.config import ServedModel

        return ServedModel(weights=self.root / "gguf" / "Q8_0.gguf", tokenizer_folder=self.root / "chat", num_threads=1)

    def ask(self) -> dict[str, Any]:
        """Serve the chat model on Ray Serve and ask it over HTTP, as any OpenAI client would."""
        from danube_ray.config import ServeConfig
        from danube_ray.inference.http import chat
        from danube_ray.runtime.serving import serving

        self.start_ray()
        with serving(ServeConfig(models={CHAT_MODEL: self.served()}, port=0)) as url:
            samples = [
                {"model": CHAT_MODEL, "prompt": question, "answer": chat(url, CHAT_MODEL, question, max_tokens=48)}
                for question in QUESTIONS
            ]
        write_json(self.root / "samples.json", samples)
        return {"question": repr(samples[0]["prompt"]), "answer": repr(samples[0]["answer"])}

    # What the user sees

    def progress(self) -> Progress:
        from danube_ray.train.progress import Progress

        return Progress(self.console)

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar for `on_progress(done, total)`."""
        with Bars(console=self.console, transient=True) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    def table(self) -> Table:
        """What was done, step by step: what came out, how long it took, and where in the run's folder it lies."""
        table = Table("step", "what came out", "seconds", f"in {shorten(self.root)}", title="What the demo did")
        for record in self.steps.done:
            facts = "\n".join(f"{name}: {value}" for name, value in record.facts.items())
            table.add_row(record.title, facts, f"{record.seconds or 0:.0f}", record.name, end_section=True)
        table.add_row("[bold]in all", "", f"[bold]{sum(record.seconds or 0 for record in self.steps.done):.0f}", "")
        return table

    def say_what_next(self, report: Path) -> None:
        sample = read_json(self.root / "samples.json")[0]
        gguf = shorten(self.root / "gguf" / "Q8_0.gguf")
        self.console.print(f"\n[bold]{sample['prompt']}[/bold]\n{sample['answer']}\n", highlight=False)
        self.console.print(f"report  [bold]{shorten(report)}[/bold]")
        self.console.print(f"serve   [bold]danube serve {CHAT_MODEL}={gguf}[/bold]", soft_wrap=True)


def settings(config: RunConfig | FinetuneConfig) -> dict[str, Any]:
    """What a step's result depends on: all but how the loop runs, such as on how many of this machine's CPUs."""
    return {name: value for name, value in to_dict(config).items() if name != "loop"}


def threads() -> int:
    """CPUs for the one training worker: up to four, all that so small a model can use. Of four one is left to Ray."""
    cpus = len(os.sched_getaffinity(0))
    return min(4, cpus if cpus < 4 else cpus - 1)


def shorten(path: Path) -> str:
    """A path as the user would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
