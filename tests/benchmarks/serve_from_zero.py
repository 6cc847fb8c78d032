"""How long the first request to an unloaded model waits for its first token, beside the time that loading takes.

A tiny model, so nearly all of it is Serve's: noticing the request, a process, its imports, and word of it to the gate.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
from ray import serve as ray_serve

from danube_ray.config import ServeConfig
from danube_ray.runtime.serving import APPLICATION, serving
from danube_ray.runtime.session import session
from tests.benchmarks.pairs import record
from tests.runtime.replicas import replicas
from tests.serve.tiny import tiny_served_model
from tests.waiting import wait_for

TRIES, AIM_S = 10, 3.0
BODY = {"model": "model", "prompt": "The Danube", "max_tokens": 4, "stream": True}


def first_token_s(http: httpx.Client) -> float:
    began = time.perf_counter()
    with http.stream("POST", "/v1/completions", json=BODY) as response:
        assert response.status_code == 200
        next(response.iter_raw())
        return time.perf_counter() - began


def load_s() -> float:
    """What the replica that has just been started says of itself."""
    handle = ray_serve.get_deployment_handle("engine-model", APPLICATION).options(method_name="load_s")
    seconds = handle.remote().result()
    handle.shutdown()
    return seconds


def main() -> None:
    waits_s, loads_s = [], []
    with tempfile.TemporaryDirectory() as folder, session():
        model = replace(tiny_served_model(Path(folder)), min_replicas=0, idle_s=3.0)
        with serving(ServeConfig(models={"model": model}, port=0)) as url, httpx.Client(base_url=url) as http:
            http.timeout = None
            for _ in range(TRIES):
                wait_for(lambda: not replicas("engine-model"))
                waits_s.append(first_token_s(http))
                loads_s.append(load_s())
                print(f"first token after {waits_s[-1]:.2f} s, of which {loads_s[-1]:.2f} s loading", flush=True)
    beside_s = [wait - load for wait, load in zip(waits_s, loads_s, strict=True)]
    print(
        f"beside loading {statistics.median(beside_s):.2f} s, at most {max(beside_s):.2f} s  (aim: at most {AIM_S} s)"
    )
    record("serve_from_zero", {"first_token_s": waits_s, "load_s": loads_s})


if __name__ == "__main__":
    main()
