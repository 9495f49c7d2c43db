# SPDX-License-Identifier: Apache-2.0
"""Files under ``deploy/``, as far as tests can check them without an image or a cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import msgspec
import pytest
import yaml

from components.credentials import VARIABLE
from components.dashboard.access import token_for
from components.engine.protocol import EngineStats
from components.status import Status, WorkerReport
from components.transfer.ids import AgentName, AgentRef, Epoch
from tests.fake_workers import INFO

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GRAPH = yaml.safe_load((DEPLOY / "kubernetes/graph.yaml").read_text())
SERVICES: dict[str, Any] = GRAPH["spec"]["services"]
CONNECTOR = ("--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}')
"""What ``components.worker`` adds, because Dynamo wants a prefill worker to name one."""


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    command = [
        str(Path(sys.executable).with_name("hadolint")),
        "-c",
        str(DEPLOY / "hadolint.yaml"),
        str(DEPLOY / "Dockerfile"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_exists_and_installs_known_extras() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r" AS (\w+)", text)) == {"cpu", "cuda"}
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split()), line
    extras = (ROOT / "pyproject.toml").read_text()
    for names in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert all(re.search(rf"^{name} = \[", extras, re.M) for name in names.split(","))


def test_compose_mounts_files_that_exist_and_depends_on_known_services() -> None:
    for name, service in COMPOSE["services"].items():
        assert "image" in service or (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), (name, volume)
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])


def test_compose_serves_a_graph_that_the_launcher_accepts() -> None:
    from components.serve.graph import load
    from components.serve.plan import make_plan, parse_overrides, read_yaml
    from components.transfer.config import Transport

    command = COMPOSE["services"]["graph"]["command"]
    overrides = [argument for argument in command if re.match(r"--\w+\.", argument)]
    plan = make_plan(load(command[1]), read_yaml(ROOT / command[3]), parse_overrides(overrides), Transport.SHM, {})
    assert plan.host == "0.0.0.0" and plan.port == 8000


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("no docker-compose here: apt-get install docker-compose")
    # Debian's version 1.29 knows all of the Compose specification but the project's name.
    without = {key: value for key, value in COMPOSE.items() if key != "name"}
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(without))
    command = ["docker-compose", "-f", str(tmp_path / "compose.yaml"), "--project-directory", str(DEPLOY)]
    done = subprocess.run([*command, "config", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prometheus_sends_the_token_that_the_page_takes(
    tmp_path: Path, use_secret: Callable[[Path | None], None]
) -> None:
    [line] = re.findall(r"^# (printf page .*) > deploy/page-token$", (DEPLOY / "compose.yaml").read_text(), re.M)
    (tmp_path / "deploy").mkdir()
    secret = tmp_path / "deploy/secret"
    secret.write_text("0123456789abcdef" * 4 + "\n")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: apt-get install openssl")
    made = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    use_secret(secret)
    assert made == token_for("0.0.0.0")
    [asked] = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    path = asked["http_sd_configs"][0]["authorization"]["credentials_file"]
    assert path == f"/run/secrets/{COMPOSE['services']['prometheus']['secrets'][0]}"
    assert COMPOSE["services"]["graph"]["environment"][VARIABLE] == "/run/secrets/dynamo"


def test_promtool_accepts_the_alert_rules() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here: apt-get install prometheus")
    command = ["promtool", "check", "rules", str(DEPLOY / "prometheus/alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_pods_of_the_graph_are_valid_kubernetes(name: str) -> None:
    spec = dict(SERVICES[name]["extraPodSpec"])
    container = {"name": "main"} | spec.pop("mainContainer")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec | {"containers": [container]}}
    kubernetes_validate.validate(pod, "1.34", strict=True)


def test_the_pod_that_is_cheapest_to_empty_is_marked_for_a_scale_down() -> None:
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes/scale-down.yaml").read_text()))
    for part in parts:
        kubernetes_validate.validate(part, "1.34", strict=True)
    [script] = [code for part in parts if part["kind"] == "ConfigMap" for code in part["data"].values()]
    known: dict[str, Any] = {"__name__": "cost"}
    exec(compile(script, "cost.py", "exec"), known)
    names = ("graph-0-decodeworker-7d9-x2kfz-1", "graph-0-decodeworker-1-1-tp0", "graph-0-prefillworker-1-1")
    status = Status(
        tuple(
            WorkerReport(
                worker=name[-8:],
                role="prefill" if "prefill" in name else "decode",
                info=msgspec.structs.replace(INFO, agents=(AgentRef(AgentName(name), Epoch("")),)),
                stats=EngineStats(1, 0, 0, 0, 55, 100),
                draining="tp0" in name,
            )
            for name in names
        )
        + (WorkerReport("missing", missing="no answer"),)
    )
    told = msgspec.json.decode(msgspec.json.encode(status))["workers"]
    assert known["costs"](told) == {"graph-0-decodeworker-7d9-x2kfz": "4", "graph-0-decodeworker-1": "-1000"}


def test_prometheus_operator_reads_the_port_that_the_pods_have() -> None:
    monitor = yaml.safe_load((DEPLOY / "kubernetes/monitoring.yaml").read_text())
    [label] = monitor["spec"]["selector"]["matchLabels"].items()
    assert label == ("nvidia.com/dynamo-graph-deployment-name", GRAPH["metadata"]["name"])
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["system", "http"]
    for name in ("PrefillWorker", "DecodeWorker"):
        [port] = SERVICES[name]["extraPodSpec"]["mainContainer"]["ports"]
        assert port["name"] == "system"


@pytest.mark.parametrize("name", [name for name in SERVICES if name.endswith("Worker")])
def test_workers_drain_before_they_end_and_have_rdma(name: str, tiny_llama: str) -> None:
    from dynamo.vllm.args import parse_args as worker_arguments

    service = SERVICES[name]
    pod, container = service["extraPodSpec"], service["extraPodSpec"]["mainContainer"]
    variables = {e["name"]: e.get("value") for e in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > float(variables["DYN_MIGRATE_DRAIN_S"])
    assert variables["DYN_MIGRATE_HOST"] == "$(POD_IP)"
    assert "kill -TERM 1" in container["lifecycle"]["preStop"]["exec"]["command"][2]
    assert service["resources"]["limits"]["custom"]["rdma/ib"] == "2"
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert container["command"][:3] == ["python", "-m", "components.worker"]
    config = worker_arguments([*container["command"][3:], *container["args"], f"--model={tiny_llama}", *CONNECTOR])
    assert config.disaggregation_mode.value == name.removesuffix("Worker").lower()
    assert int(service["resources"]["limits"]["gpu"]) == config.engine_args.tensor_parallel_size
    assert config.use_kv_events


def test_the_frontend_takes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamo.frontend.main import parse_args

    monkeypatch.setattr("sys.argv", ["frontend", *SERVICES["Frontend"]["extraPodSpec"]["mainContainer"]["args"]])
    config = parse_args()[0]
    assert (config.router_mode, config.http_port) == ("kv", 8000) and config.migration_limit
