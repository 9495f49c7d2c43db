# SPDX-License-Identifier: Apache-2.0
"""Credentials and TLS of real etcd and NATS servers: access, error messages, and secrets outside the logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from components.address import Address
from components.errors import ConfigError, TransferError, TransferUnavailable
from components.serve.servers import free_port
from components.transfer import AgentConfig
from components.transfer.control.endpoint import Endpoint, without_secrets
from tests.conftest import etcd_server, nats_server
from tests.integration.test_stores import agents, move, until

pytestmark = pytest.mark.integration
USER, PASSWORD = "mover", "s3cret-Passw0rd"


@dataclass(frozen=True)
class Files:
    """PEM files of an authority, of a server that it knows and of a client; and of an authority nobody knows."""

    ca: str
    cert: str
    key: str
    client_cert: str
    client_key: str
    other_ca: str


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pem")
    known, other = trustme.CA(), trustme.CA()
    server, client = known.issue_cert("localhost", "127.0.0.1", "::1"), known.issue_cert("client@example.org")
    blobs = {
        "ca": known.cert_pem,
        "cert": server.cert_chain_pems[0],
        "key": server.private_key_pem,
        "client_cert": client.cert_chain_pems[0],
        "client_key": client.private_key_pem,
        "other_ca": other.cert_pem,
    }
    for name, blob in blobs.items():
        blob.write_to_path(folder / name)
    return Files(**{name: str(folder / name) for name in blobs})


async def _restrict(port: int) -> None:
    from etcd3aio.auth import PermissionType
    from etcd3aio.client import Etcd3Client

    async with Etcd3Client([f"127.0.0.1:{port}"]) as client:
        assert client.auth is not None
        await client.auth.user_add("root", "root-password")
        await client.auth.role_add("root")
        await client.auth.user_grant_role("root", "root")
        await client.auth.role_add("agents")
        await client.auth.role_grant_permission(
            "agents", "/dynamo-migrate/", "/dynamo-migrate0", perm_type=PermissionType.READWRITE
        )
        for user, roles in ((USER, ["agents"]), ("nobody", [])):
            await client.auth.user_add(user, PASSWORD)
            for role in roles:
                await client.auth.user_grant_role(user, role)
        await client.auth.auth_enable()


@pytest.fixture(scope="module")
def guarded_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with etcd_server(tmp_path_factory.mktemp("guarded"), port):
        asyncio.run(_restrict(port))
        yield f"http://127.0.0.1:{port}"


def tls(pem: Files) -> tuple[str, ...]:
    return "--cert-file", pem.cert, "--key-file", pem.key, "--client-cert-auth", "--trusted-ca-file", pem.ca


@pytest.fixture(scope="module")
def tls_etcd(tmp_path_factory: pytest.TempPathFactory, pem: Files) -> Iterator[int]:
    port = free_port()
    with etcd_server(tmp_path_factory.mktemp("tls"), port, more=tls(pem), scheme="https"):
        yield port


@pytest.fixture(scope="module")
def guarded_nats(tmp_path_factory: pytest.TempPathFactory, pem: Files) -> Iterator[str]:
    port = free_port()
    tls = ("--tls", "--tlscert", pem.cert, "--tlskey", pem.key)
    with nats_server(tmp_path_factory.mktemp("guarded-nats"), port, more=("--user", USER, "--pass", PASSWORD, *tls)):
        yield f"nats://localhost:{port}"


def refused(text: str, **where: object) -> str:
    """The one error of an agent that may not publish; it comes long before the time for publishing is over."""
    began = time.monotonic()
    with pytest.raises(TransferUnavailable, match=text) as caught, agents("a", **where):
        pass
    assert time.monotonic() - began < 10
    assert PASSWORD not in str(caught.value) and "wrong-one" not in str(caught.value)
    return str(caught.value)


def test_agents_with_a_password_find_each_other(guarded_etcd: str) -> None:
    where: dict[str, object] = {"etcd_endpoints": (guarded_etcd,), "etcd_user": USER, "etcd_password": PASSWORD}
    with agents("a", "b", lease_ttl_s=2, **where) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        assert move(b, a)
        a.close()
        until(lambda: "a" not in b.known_peers(), "the closed agent is forgotten")


@pytest.mark.parametrize(
    "user, password, text",
    [
        (USER, "wrong-one", "etcd_user.*mover"),
        ("nobody", PASSWORD, "roles for keys under"),
        ("", "", "etcd_user"),
    ],
)
def test_who_may_not_publish_in_etcd_is_told_why(guarded_etcd: str, user: str, password: str, text: str) -> None:
    message = refused(text, etcd_endpoints=(guarded_etcd,), etcd_user=user, etcd_password=password)
    assert guarded_etcd.removeprefix("http://") in message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_agents_with_certificates_find_each_other(tls_etcd: int, pem: Files, host: str, tmp_path: Path) -> None:
    port = free_port() if host == "::1" else tls_etcd
    where: dict[str, object] = {
        "etcd_endpoints": (f"https://{Address(host, port)}",),
        "etcd_ca": pem.ca,
        "etcd_cert": pem.client_cert,
        "etcd_key": pem.client_key,
    }
    own = etcd_server(tmp_path, port, host, tls(pem), "https") if host == "::1" else contextlib.nullcontext()
    with own, agents("a", "b", **where) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        assert move(b, a)


def test_certificates_that_are_not_accepted_are_one_error(tls_etcd: int, pem: Files) -> None:
    url = f"https://127.0.0.1:{tls_etcd}"
    client: dict[str, object] = {"etcd_cert": pem.client_cert, "etcd_key": pem.client_key}
    refused("etcd_ca", etcd_endpoints=(url,), etcd_ca=pem.other_ca, **client)
    with pytest.raises(ConfigError, match="etcd_ca"), agents("a", etcd_endpoints=(f"127.0.0.1:{tls_etcd}",), **client):
        pass


def test_a_client_without_certificate_is_not_let_in(tls_etcd: int, pem: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    # The server just closes the connection: what is wrong is not known for sure, so it is tried until the time is over.
    monkeypatch.setattr("components.transfer.control.publisher.PUBLISH_S", 4.0)
    url = f"https://127.0.0.1:{tls_etcd}"
    with pytest.raises(TransferError, match=str(tls_etcd)), agents("a", etcd_endpoints=(url,), etcd_ca=pem.ca):
        pass


def test_agents_with_a_password_find_each_other_over_nats_with_tls(guarded_nats: str, pem: Files) -> None:
    where: dict[str, object] = {"nats_url": guarded_nats, "nats_ca": pem.ca}
    with agents("a", "b", lease_ttl_s=2, nats_user=USER, nats_password=PASSWORD, **where) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        assert move(b, a)
    within = guarded_nats.replace("nats://", f"nats://{USER}:{PASSWORD}@")
    with agents("a", nats_url=within, nats_ca=pem.ca) as [a]:
        until(lambda: a.known_peers() == ["a"], "it has published")


def test_who_may_not_publish_in_nats_is_told_why(guarded_nats: str, pem: Files) -> None:
    refused("nats_user", nats_url=guarded_nats, nats_ca=pem.ca, nats_user=USER, nats_password="wrong-one")
    refused("nats_user", nats_url=guarded_nats.replace("//", f"//{USER}:wrong-one@"), nats_ca=pem.ca)
    refused("nats_user", nats_url=guarded_nats, nats_ca=pem.ca)
    refused("nats_ca", nats_url=guarded_nats, nats_ca=pem.other_ca, nats_user=USER, nats_password=PASSWORD)
    missing = str(Path(pem.ca).parent / "none.pem")
    with pytest.raises(ConfigError, match="none.pem"), agents("a", nats_url=guarded_nats, nats_ca=missing):
        pass


def test_a_token_opens_nats(tmp_path: Path) -> None:
    port = free_port()
    with nats_server(tmp_path, port, more=("--auth", PASSWORD)):
        url = f"nats://127.0.0.1:{port}"
        with agents("a", nats_url=url, nats_token=PASSWORD) as [a]:
            until(lambda: a.known_peers() == ["a"], "it has published")
        refused("nats_token", nats_url=url, nats_token="wrong-one")


def test_secrets_are_in_no_log_and_no_repr(
    guarded_etcd: str, guarded_nats: str, pem: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = guarded_nats.replace("//", f"//{USER}:{PASSWORD}@")
    where: dict[str, object] = {"etcd_endpoints": (guarded_etcd,), "etcd_user": USER, "nats_ca": pem.ca}
    with agents("a", etcd_password=PASSWORD, nats_url=url, **where) as [a]:
        until(lambda: a.known_peers() == ["a"], "it has published")
        refused("etcd_user", etcd_password="wrong-one", nats_url=url.replace(PASSWORD, "wrong-one"), **where)
    config = AgentConfig(name="a", etcd_password=PASSWORD, nats_password=PASSWORD, nats_token=PASSWORD, nats_url=url)
    text = caplog.text + repr(config) + str(config)
    assert PASSWORD not in text and "wrong-one" not in text
    assert "name='a'" in repr(config)


@pytest.mark.parametrize("url", ["", "ftp://x:1", "http://x:port", "http://"])
def test_an_address_that_cannot_be_read_is_one_error(url: str) -> None:
    with pytest.raises(ConfigError, match="etcd_endpoints"):
        Endpoint.of(url)


def test_addresses_are_told_without_their_secrets() -> None:
    assert without_secrets("nats://user:p@ss@host:4222") == "nats://host:4222"
    assert without_secrets("token@host") == "host"
    assert without_secrets("http://host:2379") == "http://host:2379"
    assert Endpoint.of("https://etcd.example:23") == Endpoint("etcd.example", 23, True)
    assert Endpoint.of("etcd.example") == Endpoint("etcd.example", 2379, False)
