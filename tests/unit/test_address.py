# SPDX-License-Identifier: Apache-2.0
"""Addresses of both families, in every form that users write."""

from __future__ import annotations

import socket

import pytest

from components.address import Address, dialled, in_url, is_any, is_loopback, listen
from components.serve.servers import answers


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("http://127.0.0.1:2379", "127.0.0.1", 2379),
        ("http://[::1]:2379", "::1", 2379),
        ("[::1]:80", "::1", 80),
        ("[::1]", "::1", 7),
        ("::1", "::1", 7),
        ("::", "::", 7),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        ("host", "host", 7),
        ("host:80", "host", 80),
        ("nats://user:pass@host:80", "host", 80),
        (" 10.0.0.1:80 ", "10.0.0.1", 80),
    ],
)
def test_every_form_is_read(text: str, host: str, port: int) -> None:
    assert Address.of(text, 7) == (host, port)


@pytest.mark.parametrize("text", ["", "host", ":80", "host:x", "host:70000", "[::1", "[::1]", "http://"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Address.of(text)


def test_an_address_as_text_is_read_again() -> None:
    for address in (Address("::1", 80), Address("fe80::1%eth0", 80), Address("h", 1), Address("127.0.0.1", 1)):
        assert Address.of(str(address)) == address
    assert str(Address("::1", 80)) == "[::1]:80"
    assert (in_url("::1"), in_url("[::1]"), in_url("h"), in_url("a:b")) == ("[::1]", "[::1]", "h", "a:b")


def test_what_listens_everywhere_is_reached_on_loopback_of_its_family() -> None:
    found = [dialled(host) for host in ("0.0.0.0", "::", "[::]", "0:0::0", "[::1]", "10.0.0.1", "h")]
    assert found == ["127.0.0.1", "::1", "::1", "::1", "::1", "10.0.0.1", "h"]
    assert is_any("::") and is_any("[::]") and is_any("0.0.0.0") and not is_any("::1") and not is_any("h")
    assert is_loopback("[::1]") and is_loopback("127.8.8.8") and not is_loopback("::") and not is_loopback("h")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("::1", ["::1"]),
        ("[::1]", ["::1"]),
        ("::", ["::1", "127.0.0.1"]),
        ("0.0.0.0", ["127.0.0.1"]),
        ("localhost", ["localhost", "127.0.0.1"]),
    ],
)
def test_a_listening_socket_of_either_family(host: str, reached: list[str]) -> None:
    with listen(host) as server:
        assert all(answers(where, server.getsockname()[1]) for where in reached)
