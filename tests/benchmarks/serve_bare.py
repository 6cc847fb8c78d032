"""The bare engine: llama.cpp's own HTTP server over a GGUF file, in a process of its own, with nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from xllamacpp.xllamacpp import CommonParams, Server

from danube_ray.config import ServedModel

LOG_ERRORS = 1


def serve(gguf: str, context_tokens: int, num_slots: int, num_threads: int) -> None:
    """Print the port, and serve until stdin ends."""
    params = CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel = context_tokens * num_slots, num_slots
    params.cpuparams.n_threads = num_threads
    params.fit_params, params.cache_ram_mib, params.ui = False, 0, False
    params.verbosity = LOG_ERRORS
    params.port = 0
    server = Server(params)
    print(server.listening_address.rpartition(":")[2], flush=True)
    sys.stdin.read()


class Bare:
    """The process, from the side of the benchmark: its port, while the block runs."""

    def __init__(self, model: ServedModel) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.serve_bare", str(model.weights), str(model.context_tokens)]
        command += [str(model.num_slots), str(model.num_threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()


if __name__ == "__main__":
    serve(str(Path(sys.argv[1])), *map(int, sys.argv[2:]))
