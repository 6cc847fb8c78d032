"""Our whole path through Ray Serve (proxy, gate, engine) against llama.cpp's own HTTP server, in turn.

Both hold the same file with the same threads and slots, and answer the same clients, which live in a process of their
own. Random weights that never draw the end of an answer, so both do the same work. Two speeds of engine:

    toy     3.5M parameters, about 1,600 tokens/s for one client: all that is slow is ours
    steady  wide layers of Danube3 500M, as many as leave a stream about 50 tokens/s at that number of clients

The time to the first token is the time from before the connection to the first piece of text.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from danube_ray.config import ServeConfig, ServedModel
from danube_ray.runtime.serving import serving
from danube_ray.runtime.session import session
from tests.benchmarks.pairs import compare, median_interval, record
from tests.benchmarks.serve_bare import Bare
from tests.benchmarks.serve_client import Clients, Load, Outcome
from tests.serve.tiny import tiny_served_model

SLOTS, CONTEXT_TOKENS, VOCAB_SIZE = 8, 512, 512
PROMPT_TOKENS, ANSWER_TOKENS = 32, 128
CROWD, CROWD_QUEUE = 32, 16  # clients at once, and how many may wait
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64}
WIDE = {"hidden_size": 1536, "intermediate_size": 4096, "num_heads": 16, "num_kv_heads": 8, "head_dim": 96}
WARMUP_TURNS = 2


@dataclass(frozen=True)
class Case:
    """One engine and one load. `aim` is the least share of the bare engine's tokens/s that is good enough."""

    clients: int
    requests: int  # of each client in a turn
    pairs: int
    num_threads: int
    shape: dict[str, int]
    aim: float | None


CASES = {
    "toy-1": Case(1, 10, 15, 1, {**NARROW, "num_layers": 5}, None),
    "toy-8": Case(8, 4, 15, 1, {**NARROW, "num_layers": 5}, 0.70),
    "steady-1": Case(1, 1, 9, 2, {**WIDE, "num_layers": 6}, 0.95),
    "steady-8": Case(8, 1, 9, 2, {**WIDE, "num_layers": 2}, 0.95),
}


def measure(case: Case, model: ServedModel, port: int, clients: Clients) -> dict[str, Any]:
    """Tokens/s and first tokens of `model` at `port` beside the bare engine's."""
    with Bare(model) as bare:
        load = Load(port, "model", case.clients, case.requests, PROMPT_TOKENS, ANSWER_TOKENS, VOCAB_SIZE)
        seen: dict[str, list[Outcome]] = {"serve": [], "bare": []}

        def turn(who: str, load: Load) -> Callable[[], float]:
            def run() -> float:
                outcome = clients(load)
                assert outcome.statuses == {"200": case.clients * case.requests}, outcome
                assert outcome.tokens == case.clients * case.requests * ANSWER_TOKENS, outcome
                seen[who].append(outcome)
                return outcome.tokens_per_s

            return run

        ours, theirs = turn("serve", load), turn("bare", replace(load, port=bare.port))
        for _ in range(WARMUP_TURNS):
            ours()
            theirs()
        ratio, figures = compare(ours, theirs, case.pairs)
    pairs = list(zip(seen["serve"], seen["bare"], strict=True))[WARMUP_TURNS:]
    first_s = [[statistics.median(outcome.first_token_s) for outcome in pair] for pair in pairs]
    later_s = [ours - theirs for ours, theirs in first_s]
    return {
        "ratio": ratio,
        "tokens_per_s": figures,
        "first_token_s": first_s,
        "first_token_later_s": {"median": statistics.median(later_s), "interval": median_interval(later_s)},
        "clients_cpu_share": max(outcome.cpu_share for pair in pairs for outcome in pair),
    }


def report(name: str, case: Case, result: dict[str, Any]) -> None:
    serve, bare = (statistics.median(column) for column in zip(*result["tokens_per_s"], strict=True))
    later, allowed_ms = result["first_token_later_s"], 80 if case.clients > 1 else 40
    low, high = later["interval"]
    aim = f"  (aim: at least {case.aim:.2f})" if case.aim else ""
    print(f"{name}: through Serve / bare: {result['ratio']}{aim}")
    print(f"{name}: {serve:,.0f} and {bare:,.0f} tokens/s, {bare / case.clients:,.0f} a bare stream")
    print(f"{name}: first token {later['median'] * 1e3:.0f} ms later [{low * 1e3:.0f}, {high * 1e3:.0f}]", end="")
    print(f"  (aim: at most {allowed_ms} ms)", flush=True)


def crowd(port: int, clients: Clients) -> dict[str, int]:
    """More clients than slots and queue hold: answers by status. Whatever isn't an answer is an honest refusal."""
    load = Load(port, "model", CROWD, 8, PROMPT_TOKENS, ANSWER_TOKENS, VOCAB_SIZE)
    statuses = clients(load).statuses
    assert statuses.keys() <= {"200", "429", "503"} and statuses["200"], statuses
    print(f"{CROWD} clients on {SLOTS} slots with {CROWD_QUEUE} places to wait: {statuses}", flush=True)
    return statuses


def main(names: tuple[str, ...] = tuple(CASES)) -> None:
    result: dict[str, Any] = {"slots": SLOTS, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
    with tempfile.TemporaryDirectory() as folder, session(), Clients() as clients:
        for name in names:
            case, home = CASES[name], Path(folder) / name
            model = replace(
                tiny_served_model(home, **case.shape),
                context_tokens=CONTEXT_TOKENS,
                num_slots=SLOTS,
                num_threads=case.num_threads,
                max_queued=CROWD_QUEUE,
            )
            with serving(ServeConfig(models={"model": model}, port=0)) as url:
                port = int(url.rpartition(":")[2])
                result[name] = {**asdict(case), **measure(case, model, port, clients)}
                report(name, case, result[name])
                if name == "toy-8":
                    result["crowd"] = crowd(port, clients)
    record("serve_speed", result)


if __name__ == "__main__":
    main(*([tuple(sys.argv[1:])] if len(sys.argv) > 1 else []))
