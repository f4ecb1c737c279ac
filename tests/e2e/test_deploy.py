"""The container and the manifests: what they name exists, and a server starts with exactly their environment."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from matvae_bench.server_process import ServerProcess
from matvae_server import cli, probe, ray_serve

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> list[Instruction]:
    """Its instructions, comments and line ends gone."""
    text = re.sub(r"^#.*\n", "", (repository / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


@pytest.fixture(scope="module")
def manifests(repository: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    documents = list(yaml.safe_load_all((repository / "deploy" / "kubernetes.yaml").read_text()))
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


@pytest.fixture(scope="module")
def container(manifests: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    (container,) = manifests["Deployment", "matvae"]["spec"]["template"]["spec"]["containers"]
    return container


@pytest.fixture(scope="module")
def variables() -> set[str]:
    """What `matvae-serve` reads from its environment."""
    return set(re.findall(r"MATVAE_[A-Z_]+", cli._parser().format_help()))


def environment(dockerfile: list[Instruction]) -> dict[str, str]:
    settings = [rest for instruction, rest in dockerfile if instruction == "ENV"]
    return dict(setting.split("=", 1) for rest in settings for setting in rest.split())


def test_stages_follow_from_each_other(dockerfile: list[Instruction]) -> None:
    stages: list[str] = []
    for instruction, rest in dockerfile:
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            assert base in stages or base == "python:${PYTHON}-slim"
            stages.append(name)
        elif instruction == "COPY" and (source := re.match(r"--from=(\S+) ", rest)):
            assert source[1] in stages
    assert {"cpu", "cuda"} <= set(stages)
    assert stages[-1] == "cpu"  # the default
    python = dict(rest.split("=") for instruction, rest in dockerfile if instruction == "ARG")["PYTHON"]
    assert tuple(map(int, python.split("."))) >= (3, 11)


def test_what_is_copied_is_there_and_not_ignored(repository: Path, dockerfile: list[Instruction]) -> None:
    allowed = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for instruction, rest in dockerfile
        if instruction == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((repository / name).exists() for name in copied)
    packages = re.search(r"packages = \[(.*?)\]", (repository / "pyproject.toml").read_text(), re.DOTALL)[1]
    assert {line.split("/")[0] for line in re.findall(r'"(.+?)"', packages)} <= copied


def test_extras_commands_and_modules_exist(repository: Path, dockerfile: list[Instruction]) -> None:
    project = (repository / "pyproject.toml").read_text()
    runs = " ".join(rest for instruction, rest in dockerfile if instruction == "RUN")
    extras = re.findall(r"'\.\[(\w+)\]'", runs)
    assert extras == ["server", "gpu"]
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    commands = {name: rest for name, rest in dockerfile if name in ("ENTRYPOINT", "HEALTHCHECK", "USER", "STOPSIGNAL")}
    (entry,) = json.loads(commands["ENTRYPOINT"])
    assert re.search(rf"^{entry} = ", project, re.MULTILINE)
    check = json.loads(commands["HEALTHCHECK"].partition(" CMD ")[2])
    assert check[:2] == ["python", "-m"]
    assert importlib.util.find_spec(check[2])
    assert commands["USER"] == "10001:10001"
    assert commands["STOPSIGNAL"] == "SIGTERM"


def test_variables_are_those_of_matvae_serve(
    dockerfile: list[Instruction], container: dict[str, Any], variables: set[str]
) -> None:
    image = environment(dockerfile)
    assert {name for name in image if name.startswith("MATVAE_")} <= variables
    assert {entry["name"] for entry in container["env"]} <= variables
    exposed = next(rest for instruction, rest in dockerfile if instruction == "EXPOSE").split()
    ports = ("MATVAE_PORT", "MATVAE_HEALTH_PORT", "MATVAE_METRICS_PORT")
    assert exposed == [image[name] for name in ports]
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    assert [str(port["containerPort"]) for port in container["ports"]] == [named[name] for name in ports]


def test_probes_drain_and_secrets_fit_each_other(
    manifests: dict[tuple[str, str], dict[str, Any]], container: dict[str, Any]
) -> None:
    pod = manifests["Deployment", "matvae"]["spec"]["template"]["spec"]
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["grpc"]["port"] == int(named["MATVAE_HEALTH_PORT"])
    assert pod["terminationGracePeriodSeconds"] > float(named["MATVAE_DRAIN_SECONDS"])
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > pod["terminationGracePeriodSeconds"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert set(mounts.values()) == volumes
    for name in ("MATVAE_TLS_CERT", "MATVAE_TLS_KEY", "MATVAE_TOKEN_FILE"):
        assert str(Path(named[name]).parent) in mounts
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001  # as in the image
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"requests", "limits"} <= container["resources"].keys()


def test_services_scaler_and_budget_find_the_pods(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    deployment = manifests["Deployment", "matvae"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    for name in ("matvae", "matvae-headless"):
        service = manifests["Service", name]["spec"]
        assert service["selector"] == labels
        assert [port["targetPort"] for port in service["ports"]] == ["grpc"]
    assert manifests["Service", "matvae-headless"]["spec"]["clusterIP"] == "None"
    scaler = manifests["HorizontalPodAutoscaler", "matvae"]["spec"]
    assert (scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"]) == ("Deployment", "matvae")
    assert "replicas" not in deployment  # each apply would undo what the scaler did
    assert manifests["PodDisruptionBudget", "matvae"]["spec"]["selector"]["matchLabels"] == labels


def test_a_server_with_the_pods_environment_answers_the_images_probe(
    container: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ports are free ones here, and the secrets lie elsewhere; all else is as in the pod."""
    leaf = trustme.CA().issue_cert("localhost")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    leaf.private_key_pem.write_to_path(tmp_path / "tls.key")
    (tmp_path / "tokens").write_text("right\n")
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    named |= {name: str(tmp_path / Path(value).name) for name, value in named.items() if value.startswith("/etc/")}
    named |= {"MATVAE_HOST": "127.0.0.1", "MATVAE_HEALTH_PORT": "0", "MATVAE_METRICS_PORT": "0"}
    with ServerProcess(environment=named) as server:
        port = re.search(r"health on 127\.0\.0\.1:(\d+)", server.said)[1]
        monkeypatch.setenv("MATVAE_HEALTH_PORT", port)
        assert probe.main([]) == 0
        assert capsys.readouterr().out == f"127.0.0.1:{port}: SERVING\n"
        assert probe.main([server.address]) == 1  # in plaintext, where TLS is wanted
    assert probe.main([f"127.0.0.1:{port}"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().out


def test_the_serve_config_is_one(repository: Path) -> None:
    """Ray's own reading of it is tested with Ray; here its names and settings."""
    config = yaml.safe_load((repository / "deploy" / "ray-serve.yaml").read_text())
    (application,) = config["applications"]
    for name in (application["import_path"].replace(":", "."), *config["grpc_options"]["grpc_servicer_functions"]):
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute))
    assert config["grpc_options"]["grpc_servicer_functions"] == [ray_serve.SERVICER_FUNCTION]
    assert application["name"] == ray_serve.APPLICATION
    settings = ray_serve.config_of(application["args"])
    assert (settings.replicas, settings.max_replicas) == (2, 8)


def test_the_scaling_page_is_what_the_command_prints(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "matvae_bench.scaling"],
        cwd=repository, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (repository / "docs" / "scaling.md").read_text()


def test_the_ray_page_is_what_the_command_prints(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "matvae_bench.ray_cost", "--from", "bench/results/ray.json"],
        cwd=repository, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (repository / "docs" / "ray.md").read_text()
