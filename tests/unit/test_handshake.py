# SPDX-License-Identifier: Apache-2.0
"""The handshake of sockets, and the cost of strangers."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components import credentials
from components.acceptor import Acceptor, Limits
from components.errors import Unauthorized
from components.frames import read_exactly
from components.handshake import Steps, accepting, connect, connecting, greet

FIRST, SECOND = b"first secret " * 3, b"second secret " * 3
PURPOSE = "kv-tcp life"
Use = Callable[[bytes], None]


@pytest.fixture
def use(tmp_path: Path, use_secret: Callable[[Path | None], None]) -> Use:
    """Take another secret from now on; an empty one is none."""

    def take(secret: bytes) -> None:
        path = tmp_path / "secret"
        path.write_bytes(secret)
        use_secret(path if secret else None)

    return take


def play(server: Steps, client: Steps, use: Use, secrets: tuple[bytes, bytes]) -> bytes:
    """Both sides in turn, each with its own secret; what the server has sent."""
    use(secrets[0])
    sent = next(server)
    next(server)
    next(client)
    use(secrets[1])
    proof = client.send(sent)  # type: ignore[arg-type]
    next(client)
    use(secrets[0])
    answer = server.send(proof)  # type: ignore[arg-type]
    use(secrets[1])
    with contextlib.suppress(StopIteration):
        client.send(answer)  # type: ignore[arg-type]
    return sent + answer  # type: ignore[operator]


@pytest.mark.parametrize("secret", [FIRST, b""], ids=["with a secret", "without one"])
def test_both_sides_of_one_system_and_purpose_recognise_each_other(use: Use, secret: bytes) -> None:
    seen = [play(accepting(PURPOSE), connecting(PURPOSE), use, (secret, secret)) for _ in range(2)]
    assert seen[0] != seen[1]
    assert not secret or secret not in seen[0]


STRANGERS = {
    "another secret": (PURPOSE, (FIRST, SECOND)),
    "no secret": (PURPOSE, (FIRST, b"")),
    "a secret where there is none": (PURPOSE, (b"", SECOND)),
    "another life of the process": ("kv-tcp life before", (FIRST, FIRST)),
    "another socket of the process": ("kv-shm life", (FIRST, FIRST)),
    "another life, without secrets": ("kv-tcp life before", (b"", b"")),
}


@pytest.mark.parametrize("who", list(STRANGERS))
def test_whoever_has_not_the_secret_or_means_another_process_is_refused(use: Use, who: str) -> None:
    purpose, secrets = STRANGERS[who]
    with pytest.raises(Unauthorized):
        play(accepting(PURPOSE), connecting(purpose), use, secrets)


def test_a_recorded_proof_opens_nothing(use: Use) -> None:
    use(FIRST)
    server, client = accepting(PURPOSE), connecting(PURPOSE)
    hello = next(server)
    next(server), next(client)
    proof = client.send(hello)  # type: ignore[arg-type]
    answer = server.send(proof)  # type: ignore[arg-type]
    again = accepting(PURPOSE)
    next(again), next(again)
    with pytest.raises(Unauthorized):
        again.send(proof)  # type: ignore[arg-type]
    impostor = connecting(PURPOSE)
    next(impostor), impostor.send(hello), next(impostor)  # type: ignore[arg-type]
    with pytest.raises(Unauthorized):
        impostor.send(answer)  # type: ignore[arg-type]


def test_a_server_cannot_be_made_to_prove_a_client(use: Use) -> None:
    use(FIRST)
    victim, other = accepting(PURPOSE), accepting(PURPOSE)
    nonce = next(victim)[8:]  # type: ignore[index]
    next(victim), next(other), next(other)
    # All that a stranger gets from the other server is a number; it says nothing more before the client has proved.
    with pytest.raises(Unauthorized):
        other.send(nonce + bytes(32))
    with pytest.raises(Unauthorized):
        victim.send(nonce + credentials.mac(b"dynmig1\n", b"server", PURPOSE.encode(), nonce, nonce))


class Server:
    """An acceptor that answers one byte, and counts."""

    def __init__(self, **limits: float) -> None:
        self.served = threading.Semaphore(0)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listening.getsockname()[1]}"
        self.acceptor = Acceptor(listening, PURPOSE, self._serve, "test", Limits(**limits))  # type: ignore[arg-type]

    def _serve(self, connection: socket.socket) -> None:
        self.served.release()
        connection.settimeout(30)
        while data := connection.recv(1):
            connection.sendall(data)

    def stranger(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=30)

    def peer(self) -> socket.socket:
        return connect(self.address, PURPOSE, time.monotonic() + 30)


@pytest.fixture
def server(use: Use) -> Iterator[Callable[..., Server]]:
    use(FIRST)
    made: list[Server] = []

    def make(**limits: float) -> Server:
        made.append(Server(**limits))
        return made[-1]

    yield make
    for each in made:
        each.acceptor.close()


def is_served(sock: socket.socket) -> bool:
    sock.settimeout(30)
    try:
        sock.sendall(b"?")
        return read_exactly(sock, 1, time.monotonic() + 30) == b"?"
    except OSError:
        return False


def end_of(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(4096):
            got += part
    return got


def test_nothing_is_served_to_a_stranger_whatever_it_sends(
    server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = server(proof_s=2.0)
    for said in (b"", b"\x00\x00\x00\x05hello", bytes(64), b"\xff" * 100_000):
        with made.stranger() as stranger:
            with contextlib.suppress(OSError):
                stranger.sendall(said)
            assert len(end_of(stranger)) == 40
    assert not made.served.acquire(blocking=False)
    with made.peer() as peer:
        assert is_served(peer)
    assert FIRST.decode() not in caplog.text


def test_strangers_that_say_nothing_hold_few_threads_and_keep_no_peer_out(server: Callable[..., Server]) -> None:
    made = server(unproven=8, yield_s=0.0, proof_s=60.0)
    before = threading.active_count()
    silent = [made.stranger() for _ in range(100)]
    with made.peer() as peer:
        assert is_served(peer)
        assert threading.active_count() - before <= 10
    for sock in silent:
        sock.close()


def test_a_stranger_is_cut_off_after_its_time(server: Callable[..., Server]) -> None:
    made = server(proof_s=0.1)
    with made.stranger() as stranger:
        assert len(end_of(stranger)) == 40


def test_no_more_peers_are_served_than_there_are_threads_for(server: Callable[..., Server]) -> None:
    made = server(served=3)
    peers = [made.peer() for _ in range(3)]
    assert all(is_served(peer) for peer in peers)
    with made.peer() as another:
        assert not is_served(another)
    peers.pop().close()
    for _ in range(200):  # Until the thread of the one that left has noticed.
        with made.peer() as another:
            if is_served(another):
                break
    else:
        pytest.fail("no place became free")
    for peer in peers:
        peer.close()


def test_closing_ends_every_connection(server: Callable[..., Server]) -> None:
    made = server()
    peer, stranger = made.peer(), made.stranger()
    assert is_served(peer) and len(read_exactly(stranger, 40, time.monotonic() + 30)) == 40
    made.acceptor.close()
    assert end_of(peer) == end_of(stranger) == b""
    with pytest.raises(OSError):
        made.stranger()


def test_an_impostor_is_told_nothing_but_a_proof(use: Use) -> None:
    use(FIRST)
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"dynmig1\n" + bytes(64))
        with pytest.raises(Unauthorized, match="has not the secret"):
            greet(near, connecting(PURPOSE), time.monotonic() + 30)
        near.close()
        assert len(end_of(far)) == 64
