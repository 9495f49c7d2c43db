# SPDX-License-Identifier: Apache-2.0
"""Settings: precedence, interpretation of values, and invalid values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.cli.serve import resolve
from components.config import FrontendConfig, WorkerConfig, parse
from components.errors import ConfigError
from components.serve.graph import load
from components.serve.plan import Plan, make_plan, parse_overrides, read_yaml
from components.transfer.config import AgentConfig, Transport
from components.transfer.control.factory import store_of
from components.worker.settings import WorkerSettings
from tests.flags import flag

DTYPE = "--Common.dtype=bfloat16"


def plan(file: dict[str, dict[str, Any]], *arguments: str) -> Plan:
    overrides = parse_overrides([DTYPE, *arguments])
    return make_plan(load("graphs.disagg:Frontend"), file, overrides, Transport.AUTO, {})


def decode(found: Plan, name: str) -> str:
    """What a decode worker is told of a key."""
    process = next(p for p in found.processes if p.component == "DecodeWorker")
    return process.environment.get(f"DYN_MIGRATE_{name.upper()}") or flag(process.command, name)


@pytest.mark.parametrize(
    ("places", "winner"),
    [
        (["file's Common"], 11),
        (["file's Common", "file's own"], 12),
        (["file's Common", "file's own", "argument's Common"], 13),
        (["file's Common", "file's own", "argument's Common", "argument's own"], 14),
        (["file's own", "argument's Common"], 13),
        (["file's Common", "argument's own"], 14),
    ],
)
def test_one_order_of_places_decides(places: list[str], winner: int) -> None:
    file = {name: {"seed": seed} for name, seed in (("Common", 11), ("DecodeWorker", 12))}
    file = {
        name: block for name, block in file.items() if f"file's {'Common' if name == 'Common' else 'own'}" in places
    }
    arguments = {"argument's Common": "--Common.seed=13", "argument's own": "--DecodeWorker.seed=14"}
    found = plan(file, *(argument for place, argument in arguments.items() if place in places))
    assert decode(found, "seed") == str(winner)


def test_a_key_is_the_same_with_dashes_and_underscores(tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text("DecodeWorker: {max_num_seqs: 3}\n")
    assert decode(plan(read_yaml(path)), "max-num-seqs") == "3"
    assert decode(plan(read_yaml(path), "--DecodeWorker.max-num-seqs=4"), "max-num-seqs") == "4"


def test_a_name_that_is_written_down_wins_over_one_that_a_model_implies(tiny_llama: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text("Common: {model: smollm2, served-model-name: prod}\n")

    def named(*arguments: str) -> str:
        return resolve("graphs.disagg:Frontend", path, Transport.AUTO, None, "", [DTYPE, *arguments]).model

    assert named(f"--Common.model={tiny_llama}") == "prod"
    assert named(f"--Common.model={tiny_llama}", "--Common.served-model-name=test") == "test"
    path.write_text("Common: {model: smollm2}\n")
    assert named(f"--Common.model={tiny_llama}") == tiny_llama


@pytest.mark.parametrize("text", ["::", "::1", "[::1]", "on", "1:20", "0x10", "null", "2026-11-29", "{a", "a: b", "-"])
def test_text_on_the_command_line_is_not_read_as_yaml(text: str) -> None:
    assert decode(plan({}, f"--Common.served-model-name={text}"), "served-model-name") == text


def test_quotes_on_the_command_line_are_yamls() -> None:
    assert decode(plan({}, "--Common.served-model-name='a b'"), "served-model-name") == "a b"


@pytest.mark.parametrize("text", ["off", "full"])
def test_a_choice_that_yaml_takes_for_a_truth_value_is_meant(text: str, tmp_path: Path) -> None:
    assert decode(plan({}, f"--DecodeWorker.integrity={text}"), "integrity") == text
    path = tmp_path / "graph.yaml"
    path.write_text(f"DecodeWorker: {{integrity: {text}}}\n")
    assert decode(plan(read_yaml(path)), "integrity") == text


@pytest.mark.parametrize("host", ["::", "::1", "[::1]", "[::]", "0.0.0.0", "127.0.0.1", "localhost", "my-host.lan"])
def test_every_form_of_a_host_is_taken(host: str) -> None:
    found = plan({}, f"--Frontend.host={host}")
    assert found.host == host.strip("[]")
    front = next(p for p in found.processes if p.component == "Frontend")
    assert flag(front.command, "http-host") == found.host


@pytest.mark.parametrize(
    ("host", "url"),
    [("::1", "[::1]"), ("::", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("h", "h")],
)
def test_the_frontend_is_reached_at_a_url(host: str, url: str) -> None:
    assert plan({}, f"--Frontend.host={host}", "--Frontend.port=81").url == f"http://{url}:81"


@pytest.mark.parametrize("host", ["", "http://h", "h:80", "[::1]:80", "a b"])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"Frontend\.host.*host name or an address"):
        parse(FrontendConfig, "Frontend", {"host": host})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_nobody_is_reached_at_an_address_that_means_every_interface(host: str) -> None:
    with pytest.raises(ConfigError, match=r"advertise-host.*where to listen"):
        parse(WorkerConfig, "DecodeWorker", {"advertise-host": host})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kv-memory-gib", float("inf")),
        ("lease-s", float("nan")),
        ("seed", -1),
        ("max-num-batched-tokens", 0),
        ("devices", [[0, 0]]),
        ("devices", [[-1]]),
        ("dtype", True),
    ],
)
def test_values_without_sense_are_refused_with_their_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"DecodeWorker.*{key}"):
        parse(WorkerConfig, "DecodeWorker", {key: value})


def test_text_that_a_file_lost_to_yaml_is_told_to_be_quoted(tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_text("Common: {served-model-name: on}\n")
    with pytest.raises(ConfigError, match="served-model-name = True.*quote it"):
        plan(read_yaml(path))


def test_the_transfer_agent_is_told_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {"backends": ["cuda_ipc", "tcp"], "staging-bytes": 1 << 26}
    told = decode(plan({"Common": {"transfer": tuned}}), "transfer")
    monkeypatch.setenv("DYN_MIGRATE_TRANSFER", told)
    agent = AgentConfig.of(WorkerSettings.from_environment().agent)
    assert (agent.backends, agent.staging_bytes) == (("cuda_ipc", "tcp"), 1 << 26)
    wrongs = {"no setting name": {"name": "mine"}, "tpc": {"backends": ["tpc"]}}
    for named, wrong in wrongs.items():
        with pytest.raises(ConfigError, match=named):
            plan({"Common": {"transfer": wrong}})


def test_records_can_live_in_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", "nats://127.0.0.1:4222")
    monkeypatch.setenv("DYN_MIGRATE_TRANSFER", '{"store": "nats"}')
    assert type(store_of(AgentConfig.of(WorkerSettings.from_environment().agent))).__name__ == "NatsStore"
