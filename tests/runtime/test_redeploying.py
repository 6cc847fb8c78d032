"""Servers that start, change and end: nothing under way is broken, and what can't be done is one clear error."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import openai
import psutil
import pytest
import yaml
from ray import serve as ray_serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from starlette.requests import Request

from danube_ray.config import ConfigError, GateSettings, ServeConfig, ServedModel
from danube_ray.inference.http import chat
from danube_ray.runtime.deployments import room_beside
from danube_ray.runtime.serving import Server, check_room, cluster, drain, listen, serve, serve_details, serving
from danube_ray.serve.files import read_config, write_config
from tests.runtime.replicas import replica, replicas
from tests.serve.tiny import tiny_served_model
from tests.waiting import wait_for

QUESTION = "Which river is longer?"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return tiny_served_model(tmp_path_factory.mktemp("other"), seed=1)


@contextmanager
def running(file: Path) -> Iterator[Server]:
    with cluster(read_config(file)) as server:
        server.deploy()
        try:
            yield server
        finally:
            drain()


class Load:
    """Clients that stream one greedy answer after the other until they are stopped; `answers` are how each begins:
    later on, answers computed side by side may differ in rounding."""

    def __init__(self, url: str, model: str, clients: int = 4, max_tokens: int = 400) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.model, self.clients, self.max_tokens = model, clients, max_tokens
        self.answers: list[str] = []
        self.begun, self.stopped = threading.Event(), threading.Event()

    def stream(self) -> str:
        """One answer, which must be whole: an error event or a connection that breaks raises."""
        messages = [{"role": "user", "content": QUESTION}]
        text, reason = "", None
        for chunk in self.client.chat.completions.create(
            model=self.model, messages=messages, max_tokens=self.max_tokens, temperature=0, stream=True
        ):
            self.begun.set()
            text, reason = text + (chunk.choices[0].delta.content or ""), chunk.choices[0].finish_reason
        assert reason == "length"
        return text

    def run(self) -> None:
        while not self.stopped.is_set():
            self.answers.append(self.stream()[:3])

    def __enter__(self) -> Load:
        self.threads = ThreadPoolExecutor(self.clients)
        self.runs = [self.threads.submit(self.run) for _ in range(self.clients)]
        wait_for(lambda: len(self.answers) >= self.clients)
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.threads.shutdown()
        for run in self.runs:
            run.result()


@pytest.mark.ray
@pytest.mark.parametrize("num_threads", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_redeploy_breaks_no_stream(
    ray_session: None, served: ServedModel, other: ServedModel, tmp_path: Path, num_threads: int
):
    """Of four CPUs, 1 thread leaves room for the new engine beside the old; 3 make it wait until the old has ended.
    Only the changed model's engine is replaced, and after a broken file everything is as before."""
    file = tmp_path / "serve.yaml"
    changing = replace(served, num_slots=2, num_threads=num_threads)
    config = ServeConfig(models={"changing": changing, "steady": served}, port=0)
    write_config(config, file)
    with running(file) as server, Load(server.url, "changing") as load:
        old, steady, gate = (replica(name) for name in ("engine-changing", "engine-steady", "gate"))
        before = set(load.answers)
        new = replace(changing, num_slots=4, weights=other.weights)
        write_config(replace(config, models={**config.models, "changing": new}), file)
        wait_for(lambda: room_beside(config) == (num_threads == 1))  # what ran before may still hold CPUs
        server.reread(file)
        wait_for(lambda: set(load.answers) - before)
        deployed = serve_details()["applications"]["danube"]["deployments"]["engine-changing"]
        assert deployed["deployment_config"]["max_surge_percent"] == (100 if num_threads == 1 else 0)
        assert replicas("engine-changing") != [old]
        assert (replica("engine-steady"), replica("gate")) == (steady, gate)
        file.write_text("http_options: {hots: 1}")
        server.reread(file)
        assert chat(server.url, "changing", QUESTION, max_tokens=4)
        assert server.config.models["changing"] == new
    assert len(before) == 1
    assert len(set(load.answers)) == 2, "of the old weights and of the new"


@pytest.mark.ray
@pytest.mark.slow
def test_another_danube_serve_in_the_cluster_redeploys_the_first(
    ray_session: None, served: ServedModel, other: ServedModel, capsys: pytest.CaptureFixture[str]
):
    """It returns; the server goes on at its address, with the models of the second, and ends with the first."""
    config = ServeConfig(models={"old": served}, port=0)
    with serving(config) as url:
        serve(replace(config, models={"new": other}))
        assert f"redeployed with new: {url}" in capsys.readouterr().out
        assert chat(url, "new", QUESTION, max_tokens=4)
        assert [model.id for model in openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list()] == ["new"]
        elsewhere = replace(config, port=int(url.rpartition(":")[2]) + 1)
        with pytest.raises(ConfigError, match="where Serve listens for danube"):
            serve(elsewhere)
    assert "danube" not in serve_details().get("applications", {})


@pytest.mark.ray
@pytest.mark.slow
def test_a_new_gate_breaks_no_stream(ray_session: None, served: ServedModel, tmp_path: Path):
    file = tmp_path / "serve.yaml"
    config = ServeConfig(models={"tiny": served}, port=0)
    write_config(config, file)
    with running(file) as server, Load(server.url, "tiny", clients=2) as load:
        engine, gate = replica("engine-tiny"), replica("gate")
        write_config(replace(config, gate=GateSettings(max_choices=1)), file)
        server.reread(file)
        answered = len(load.answers)
        wait_for(lambda: len(load.answers) >= answered + 4)
        wait_for(lambda: not psutil.pid_exists(gate))
        assert replica("engine-tiny") == engine
        with pytest.raises(openai.BadRequestError):
            load.client.completions.create(model="tiny", prompt="a", n=2, max_tokens=1)


@pytest.mark.ray
@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_clear_error(
    ray_session: None, served: ServedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its header is right, so only llama.cpp can tell. A server that runs goes on with what it had."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(served.weights.read_bytes().replace(b"output_norm.weight", b"output_horm.weight"))
    file = tmp_path / "serve.yaml"
    config = ServeConfig(models={"tiny": served}, port=0)
    write_config(config, file)
    with running(file) as server:
        write_config(replace(config, models={"tiny": replace(served, weights=broken)}), file)
        server.reread(file)
        assert "broken.gguf" in capsys.readouterr().out
        assert chat(server.url, "tiny", QUESTION, max_tokens=4)
    with pytest.raises(ConfigError, match=r"broken\.gguf"), serving(read_config(file)):
        pass


@pytest.mark.ray
@pytest.mark.slow
def test_serve_deploy_takes_the_file(ray_session: None, served: ServedModel, tmp_path: Path):
    """What `serve deploy` and KubeRay do with it. They restart every replica, one after the other, and no stream."""
    port, file = listen("127.0.0.1", 0), tmp_path / "serve.yaml"
    client = _get_global_client()
    config = ServeConfig(models={"tiny": served}, port=port)
    write_config(config, file)
    client.deploy_apps(schema(file), _blocking=True)
    try:
        with Load(f"http://127.0.0.1:{port}", "tiny", clients=2) as load:
            engine, gate = replica("engine-tiny"), replica("gate")
            write_config(replace(config, models={"tiny": replace(served, num_slots=3)}), file)
            client.deploy_apps(schema(file), _blocking=True)
            wait_for(lambda: not psutil.pid_exists(engine) and not psutil.pid_exists(gate))
            answered = len(load.answers)
            wait_for(lambda: len(load.answers) >= answered + 4)
        file.write_text(file.read_text().replace(f"weights: {served.weights}", "weights: model.gguf"))
        client.deploy_apps(schema(file))
        wait_for(lambda: "an absolute path" in ray_serve.status().applications["danube"].message)
    finally:
        drain()


def schema(file: Path) -> ServeDeploySchema:
    return ServeDeploySchema(**yaml.safe_load(file.read_text()))


@ray_serve.deployment(name="hello", ray_actor_options={"num_cpus": 0})
class Hello:
    def __call__(self, request: Request) -> str:
        return "hello"


@pytest.mark.ray
@pytest.mark.slow
def test_other_applications_of_the_cluster_go_on(ray_session: None, served: ServedModel):
    with serving(ServeConfig(models={"tiny": served}, port=0)) as url:
        port = int(url.rpartition(":")[2])
        ray_serve.run(Hello.bind(), name="hello", route_prefix="/hello")
    assert urlopen(f"{url}/hello").read() == b"hello"
    with serving(ServeConfig(models={"tiny": served}, port=0)) as again:
        assert again == url
        assert urlopen(f"{url}/hello").read() == b"hello"
        assert chat(url, "tiny", QUESTION, max_tokens=4)
        config = ServeConfig(models={"tiny": served}, port=0)
        with pytest.raises(ConfigError, match="the cluster is 'serving'"), serving(config):
            pass
    with pytest.raises(ConfigError, match="where Serve listens for hello"), serving(replace(config, port=port + 1)):
        pass
    assert urlopen(f"{url}/hello").read() == b"hello"
    ray_serve.delete("hello")


class Console:
    """`danube serve --config FILE` in a process of its own, and in a cluster of its own."""

    def __init__(self, file: Path) -> None:
        code = "import sys; from pathlib import Path; from danube_ray.serve.files import read_config\n"
        code += "from danube_ray.runtime.serving import serve; file = Path(sys.argv[1]); serve(read_config(file), file)"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def says(self, words: str) -> str:
        """Wait for a line with `words` in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError(f"it ended without saying {words!r}")

    def ends_well(self) -> bool:
        """Wait for its end: with status 0, and nothing of what else it said is a complaint."""
        said, _ = self.process.communicate()
        return self.process.returncode == 0 and not re.search("Traceback|ERROR", said)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.ray
@pytest.mark.slow
def test_servers_of_one_machine_answer_to_signals(served: ServedModel, other: ServedModel, tmp_path: Path):
    """Two at once keep apart. SIGHUP redeploys what has changed, and SIGTERM lets answers under way end."""
    files = [tmp_path / "one.yaml", tmp_path / "other.yaml"]
    config = ServeConfig(models={"tiny": served}, port=0)
    for file, model in zip(files, (served, other), strict=True):
        write_config(replace(config, models={"tiny": model}), file)
    with Console(files[0]) as one, Console(files[1]) as two:
        urls = [console.says("chat at").split()[2].rstrip(".") for console in (one, two)]
        marks = [Load(url, "tiny").stream()[:3] for url in urls]
        assert marks[0] != marks[1]
        write_config(replace(config, models={"tiny": other}), files[0])
        one.process.send_signal(signal.SIGHUP)
        one.says("redeployed")
        assert Load(urls[0], "tiny").stream()[:3] == marks[1]
        with ThreadPoolExecutor(1) as thread:
            load = Load(urls[0], "tiny", max_tokens=2_000)
            answer = thread.submit(load.stream)
            wait_for(lambda: load.begun.is_set())
            one.process.send_signal(signal.SIGTERM)
            assert answer.result()
        assert one.ends_well()
        assert Load(urls[1], "tiny").stream()[:3] == marks[1], "the other never noticed"
        two.process.send_signal(signal.SIGINT)
        assert two.ends_well()


def test_what_cannot_be_served_is_one_clear_error(served: ServedModel, tmp_path: Path):
    """A port in use, no model, a bad name, a bad file, an address of everybody's without keys."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"port is {port}"),
            serving(ServeConfig(models={"tiny": served}, port=port)),
        ):
            pass
    nameless = {"": served, "a/b": served, ".hidden": served}
    for models in ({}, *({name: model} for name, model in nameless.items())):
        with pytest.raises(ConfigError, match="model"), serving(ServeConfig(models=models, port=0)):
            pass
    missing = replace(served, weights=tmp_path / "missing.gguf")
    with pytest.raises(ConfigError, match=r"missing\.gguf"), serving(ServeConfig(models={"tiny": missing}, port=0)):
        pass
    with (
        pytest.raises(ConfigError, match="host is '0.0.0.0'"),
        serving(ServeConfig(models={"tiny": served}, host="0.0.0.0", port=0)),
    ):
        pass


@pytest.mark.parametrize(
    ("models", "setting"),
    [
        ([{"num_threads": 2, "min_replicas": 2, "max_replicas": 2}], None),
        ([{"num_threads": 3}, {"num_threads": 2}], "num_threads is 5"),
        ([{"num_threads": 4, "min_replicas": 0}, {"num_threads": 4}], None),
        ([{"num_threads": 5, "min_replicas": 0}], "num_threads is 5"),
        ([{"num_gpus": 1}], "num_gpus is 1"),
    ],
)
def test_engines_that_can_never_start_are_refused(served: ServedModel, models: list[dict[str, int]], setting: str):
    """On a machine of four CPUs and no GPU: also one that is unloaded and would never come."""
    config = ServeConfig(models={f"m{number}": replace(served, **model) for number, model in enumerate(models)})
    with pytest.raises(ConfigError, match=setting) if setting else nullcontext():
        check_room(config, {"CPU": 4.0})
