"""The manifests of cluster/: valid by Ray's own rules, consistent with each other and with the code they start."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from danube_ray.presets import PRESETS
from danube_ray.runtime.deployments import DRAIN_MARGIN_S
from danube_ray.runtime.session import SERVE_ENVIRONMENT
from danube_ray.serve.files import read_config
from danube_ray.serve.keys import ENVIRONMENT

CLUSTER = Path(__file__).parent.parent / "cluster"
RAY_MINOR = ".".join(ray.__version__.split(".")[:2])
GPU = "nvidia.com/gpu"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.fixture
def launcher() -> dict[str, Any]:
    return load("launcher.yaml")


@pytest.fixture
def job() -> dict[str, Any]:
    return load("kuberay-rayjob.yaml")


@pytest.fixture
def service() -> dict[str, Any]:
    return load("kuberay-rayservice.yaml")


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]


def pods(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod specs by group name."""
    spec = cluster_spec(manifest)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in {"head": spec["headGroupSpec"], **groups}.items()}


# The cluster launcher


def test_ray_accepts_the_launcher(launcher: dict[str, Any]):
    validate_config(prepare_config(launcher))


def test_ray_refuses_a_launcher_with_an_unknown_key(launcher: dict[str, Any]):
    launcher["available_node_types"]["h100"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(launcher))


def test_the_launcher_scales_nodes_of_eight_gpus_and_cpu_nodes(launcher: dict[str, Any]):
    types = prepare_config(launcher)["available_node_types"]
    assert types["h100"]["resources"]["GPU"] == 8
    assert "GPU" not in types["cpu"]["resources"]
    assert types["cpu"]["min_workers"] == 0 < types["cpu"]["max_workers"]
    assert types["h100"]["max_workers"] + types["cpu"]["max_workers"] <= launcher["max_workers"]


def test_what_a_user_must_replace_is_marked(launcher: dict[str, Any]):
    """Placeholders are the words MY_…, all of them needed: nothing that looks like somebody's account is left in."""
    text = (CLUSTER / "launcher.yaml").read_text()
    assert set(re.findall(r"\bMY_\w+", text)) == {"MY_REGISTRY", "MY_AMI", "MY_FILE_SYSTEM"}
    assert not re.search(r"\bami-[0-9a-f]{8,}|\bfs-[0-9a-f]{8,}|\b\d{12}\b", text)


def test_every_node_gets_the_token_and_the_storage(launcher: dict[str, Any]):
    assert launcher["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--volume /mnt/danube:/mnt/danube" in launcher["docker"]["run_options"]
    assert any("/mnt/danube" in command and "mount" in command for command in launcher["initialization_commands"])


# KubeRay


@pytest.mark.parametrize(
    ("name", "kind", "keys"),
    [
        (
            "kuberay-rayjob.yaml",
            "RayJob",
            {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"},
        ),
        (
            "kuberay-rayservice.yaml",
            "RayService",
            {"serveConfigV2", "rayClusterConfig", "rayClusterDeletionDelaySeconds"},
        ),
    ],
)
def test_a_manifest_is_what_kuberay_reads(name: str, kind: str, keys: set[str]):
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["spec"].keys() == keys
    spec = cluster_spec(manifest)
    cluster_keys = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster_keys <= spec.keys() <= cluster_keys | {"enableInTreeAutoscaling", "autoscalerOptions"}
    assert spec["rayVersion"].startswith(f"{RAY_MINOR}."), "the version that the package pins"
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        wanted = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group.keys() == wanted
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-rayservice.yaml"])
def test_every_container_has_an_image_resources_and_the_storage(name: str):
    images = set()
    for pod in pods(load(name)).values():
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            images.add(container["image"])
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert "/mnt/danube" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert len(images) == 1, "head and workers run one image"
    assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+:\d[\w.-]*", images.pop()), "with a version, not a moving tag"


def test_the_job_asks_for_the_workers_it_has_gpus_for(job: dict[str, Any]):
    command = job["spec"]["entrypoint"].split()
    assert command[:2] == ["python", "/opt/danube_ray/jobs/pretrain.py"]
    assert command[2] in PRESETS
    workers = int(command[command.index("--loop.num-workers") + 1])
    (group,) = cluster_spec(job)["workerGroupSpecs"]
    limits = pods(job)["h100"]["containers"][0]["resources"]["limits"]
    assert workers == group["replicas"] * int(limits[GPU])
    assert group["minReplicas"] == group["maxReplicas"], "training counts its GPUs before it starts"
    cpus_per_worker = PRESETS[command[2]]().loop.cpus_per_worker
    assert workers * cpus_per_worker + 1 <= group["replicas"] * int(limits["cpu"])
    global_batch, sequence = PRESETS[command[2]]().global_batch_tokens, PRESETS[command[2]]().longest_sequence
    assert global_batch // sequence % workers == 0, "every worker has windows of its own at every step"


def test_shared_memory_is_enough_for_the_object_store_and_nccl(job: dict[str, Any]):
    pod = pods(job)["h100"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "shared-memory"]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert "/dev/shm" in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


# Serve


@pytest.fixture
def serve_config(service: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def test_serve_and_we_read_the_configuration(serve_config: dict[str, Any], tmp_path: Path):
    """Ray Serve's schema accepts it, and ours, which accepts nothing that would be ignored."""
    assert ServeDeploySchema.model_validate(serve_config).http_options.request_timeout_s is None
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(serve_config))
    config = read_config(tmp_path / "serve.yaml")
    assert config.host == "0.0.0.0"
    assert list(config.models) == ["danube3-500m-chat"]


def test_the_application_exists_and_takes_what_it_is_given(serve_config: dict[str, Any]):
    module, name = serve_config["applications"][0]["import_path"].split(":")
    build = getattr(importlib.import_module(module), name)
    assert list(inspect.signature(build).parameters) == ["args"], "Serve calls a builder with the args of the file"


def test_a_public_address_has_keys_on_every_pod(service: dict[str, Any]):
    """From a secret: the gate refuses to open a public port without them."""
    for pod in pods(service).values():
        environment = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        assert environment[ENVIRONMENT]["valueFrom"].keys() == {"secretKeyRef"}


def test_serve_is_as_fast_on_the_pods_as_on_a_local_cluster(service: dict[str, Any]):
    for pod in pods(service).values():
        environment = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        assert environment.items() >= SERVE_ENVIRONMENT.items()


def test_answers_may_end_before_their_pod_does(service: dict[str, Any], serve_config: dict[str, Any]):
    deadline_s = serve_config["applications"][0]["args"]["gate"]["deadline_s"] + DRAIN_MARGIN_S
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= deadline_s
    assert all(pod["terminationGracePeriodSeconds"] >= deadline_s for pod in pods(service).values())


def test_an_engine_fits_its_pod(service: dict[str, Any], serve_config: dict[str, Any]):
    (model,) = serve_config["applications"][0]["args"]["models"].values()
    (group,) = cluster_spec(service)["workerGroupSpecs"]
    cpus = int(pods(service)[group["groupName"]]["containers"][0]["resources"]["limits"]["cpu"])
    assert model["num_threads"] < cpus, "one CPU is left for the proxy and the gate"
    assert model["max_replicas"] <= group["maxReplicas"] * (cpus // model["num_threads"])


# The image


def instructions() -> list[str]:
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_image_is_pinned():
    base = [line.split()[1] for line in instructions() if line.startswith("FROM")]
    assert len(base) == 1
    assert re.fullmatch(r"python:3\.12-[\w-]+", base[0])
    installs = [line for line in instructions() if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    assert "latest" not in (CLUSTER / "Dockerfile").read_text()


def test_the_image_copies_what_exists_and_runs_without_root():
    sources = [word for line in instructions() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"constraints.txt", "pyproject.toml", "danube_ray", "jobs"} <= set(sources)
    missing = [source for source in sources if not (CLUSTER.parent / source).exists()]
    assert missing == []
    kept = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert kept == set(sources), "what .dockerignore leaves out can't be copied"
    assert instructions()[-1] == "USER ray"


def test_links_of_the_readme_lead_somewhere():
    text = (CLUSTER / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    files = re.findall(r"(?<![\w/])cluster/[\w.-]+", text)
    assert links
    assert [link for link in links if not (CLUSTER / link).exists()] == []
    assert [file for file in files if not (CLUSTER.parent / file).exists()] == []
