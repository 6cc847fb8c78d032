"""Minutes of steady load on one server, with faults on the way: what clients saw, how fast it was whole again, and
whether memory stays flat.

Eight clients stream one answer after the other from two engines of four slots. In the first third an engine is killed,
the weights are changed by a redeploy, and the gate is killed, one after the other. Then nothing happens any more:
memory (PSS, which counts shared pages once) at the end is compared with memory just after the faults. At last 32
clients come at once.

    python -m tests.benchmarks.serve_soak --minutes 10 [--no-faults]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from ray import serve as ray_serve

from danube_ray.config import ServeConfig
from danube_ray.runtime.serving import APPLICATION, Server, cluster, drain
from danube_ray.runtime.session import session
from danube_ray.serve.files import read_config, write_config
from tests.benchmarks.pairs import record
from tests.runtime.replicas import actors, replica, replicas
from tests.serve.tiny import tiny_served_model
from tests.waiting import wait_for

CLIENTS, CROWD, REPLICAS, SLOTS, QUEUE = 8, 32, 2, 4, 16
ANSWER_TOKENS = 400
FAULTS_SHARE = 1 / 3


@dataclass
class Clients:
    """`number` clients in a thread of their own. `ends` counts how answers ended, by status or fault."""

    url: str
    number: int
    answers: int | None = None  # of each client; None: until `stopped`
    ends: Counter[str] = field(default_factory=Counter)
    waits_s: list[tuple[float, float]] = field(default_factory=list)  # when asked, and seconds to the first token
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Clients:
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=httpx.Limits()) as http:
            await asyncio.gather(*(self.ask_on(http) for _ in range(self.number)))

    async def ask_on(self, http: httpx.AsyncClient) -> None:
        asked = 0
        while asked < self.answers if self.answers is not None else not self.stopped.is_set():
            self.ends[await self.ask(http)] += 1
            asked += 1

    async def ask(self, http: httpx.AsyncClient) -> str:
        body = {"model": "model", "prompt": "The Danube", "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True}
        began, received = time.monotonic(), b""
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                async for piece in response.aiter_raw():
                    if not received:
                        self.waits_s.append((began, time.monotonic() - began))
                    received += piece
        except httpx.TransportError as error:
            return f"broken connection ({type(error).__name__})"
        if response.status_code != 200:
            return str(response.status_code)
        if b"data: [DONE]" in received:
            return "200"
        last = received.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: ")
        return f"error event ({json.loads(last)['error']['code']})"

    def longest_wait_s(self, since: float) -> float:
        return max((wait for began, wait in self.waits_s if began >= since), default=0.0)


def pss_mib(pids: list[int]) -> float:
    kib = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kib += int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
    return kib / 1024


def memory() -> dict[str, float]:
    """MiB of all processes of a kind."""
    pids = {"gate": replicas("gate"), "engines": replicas("engine-model"), "proxy": actors("ProxyActor")}
    return {kind: pss_mib(those) for kind, those in pids.items()}


def engines_running() -> int:
    return ray_serve.status().applications[APPLICATION].deployments["engine-model"].replica_states.get("RUNNING", 0)


class Faults:
    """What happens to the server, and seconds until it is whole again."""

    def __init__(self, server: Server, clients: Clients, file: Path, other: Path) -> None:
        self.server, self.clients, self.file, self.other = server, clients, file, other

    def kill_engine(self) -> float:
        """Until both engines run."""
        began = time.monotonic()
        os.kill(replica("engine-model"), signal.SIGKILL)
        wait_for(lambda: engines_running() < REPLICAS)
        wait_for(lambda: engines_running() == REPLICAS)
        return time.monotonic() - began

    def redeploy(self) -> float:
        """Until both engines run with other weights."""
        began = time.monotonic()
        model = replace(self.server.asked.models["model"], weights=self.other)
        write_config(replace(self.server.asked, models={"model": model}), self.file)
        self.server.reread(self.file)
        return time.monotonic() - began

    def kill_gate(self) -> float:
        """The longest that somebody waited for a first token from then on."""
        answered, began = self.clients.ends["200"], time.monotonic()
        os.kill(replica("gate"), signal.SIGKILL)
        wait_for(lambda: self.clients.ends["200"] >= answered + 2 * CLIENTS)
        return self.clients.longest_wait_s(began)

    def happen(self, name: str) -> dict[str, Any]:
        before = self.clients.ends.copy()
        took_s = getattr(self, name)()
        answered = self.clients.ends["200"]
        wait_for(lambda: self.clients.ends["200"] >= answered + CLIENTS)  # what was under way has ended
        seen = {end: number for end, number in (self.clients.ends - before).items() if end != "200"}
        print(f"{name}: whole again after {took_s:.2f} s; clients saw {seen or 'nothing of it'}", flush=True)
        return {"fault": name, "whole_again_s": took_s, "other_than_200": seen}


def wait_until(moment: float) -> None:
    wait_for(lambda: time.monotonic() >= moment)


def soak(server: Server, file: Path, other: Path, minutes: float, faults: bool) -> dict[str, Any]:
    with Clients(server.url, CLIENTS) as clients:
        began, whole_s = time.monotonic(), minutes * 60
        quiet = began + whole_s * FAULTS_SHARE
        happened = []
        for index, name in enumerate(("kill_engine", "redeploy", "kill_gate") if faults else ()):
            wait_until(began + whole_s * FAULTS_SHARE * (index + 1) / 4)
            happened.append(Faults(server, clients, file, other).happen(name))
        wait_until(quiet)
        samples = []
        for moment in spread(time.monotonic(), began + whole_s, min(60.0, whole_s / 10)):
            wait_until(moment)
            samples.append({"minute": (time.monotonic() - began) / 60, **memory()})
            print("  ".join(f"{name} {value:.1f}" for name, value in samples[-1].items()), flush=True)
    growth = {name: samples[-1][name] / samples[0][name] for name in ("gate", "engines", "proxy")}
    print("memory at the end / after the faults:", {name: round(value, 3) for name, value in growth.items()})
    print("answers:", dict(clients.ends))
    return {"faults": happened, "memory_mib": samples, "growth": growth, "ends": dict(clients.ends)}


def spread(first: float, last: float, step: float) -> list[float]:
    """Moments from `first` to `last`, about `step` apart."""
    number = max(1, round((last - first) / step))
    return [first + (last - first) * index / number for index in range(number + 1)]


def main(minutes: float = 10.0, faults: bool = True) -> None:
    with tempfile.TemporaryDirectory() as name, session(num_cpus=8):
        folder = Path(name)
        model = tiny_served_model(folder / "one")
        other = tiny_served_model(folder / "other", seed=1)
        served = replace(
            model, num_slots=SLOTS, max_queued=QUEUE, min_replicas=REPLICAS, max_replicas=REPLICAS, context_tokens=1024
        )
        file = folder / "serve.yaml"
        write_config(ServeConfig(models={"model": served}, port=0), file)
        with cluster(read_config(file)) as server:
            server.deploy()
            try:
                result = soak(server, file, other.weights, minutes, faults)
                with Clients(server.url, CROWD, answers=4) as crowd:
                    crowd.thread.join()
            finally:
                drain()
    print(f"{CROWD} clients at once: {dict(crowd.ends)}")
    assert crowd.ends.keys() <= {"200", "429", "503"}, crowd.ends
    record("serve_soak", {"minutes": minutes, **result, "crowd": dict(crowd.ends)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--no-faults", action="store_true")
    arguments = parser.parse_args()
    main(arguments.minutes, not arguments.no_faults)
