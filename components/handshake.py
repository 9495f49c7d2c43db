# SPDX-License-Identifier: Apache-2.0
"""The handshake of two processes of one system on a socket, before anything else is read or written.

    accepting side                            connecting side
    version, nonce ------------------------>
    <---------------- nonce, HMAC(client) ---  proves first: a stranger gets no value made with the secret
    HMAC(server) -------------------------->

Both HMACs are keyed with the secret (``components.credentials``) and cover both nonces, the side that makes them and
the ``purpose`` (the kind of socket and the epoch of the listening process). A proof is invalid for any other
connection, socket, process or direction. Without a secret it proves the purpose alone, which still reveals a peer of
another epoch that used the same address.

The handshake does not encrypt and does not protect later bytes from an attacker who can change packets: encrypt the
network against that. It takes 136 bytes; ``end`` bounds each side's wait. Servers use ``components.acceptor``, which
bounds the cost before the proof.
Raises ``Unauthorized`` for a failed proof, ``OSError`` and ``TimeoutError`` as sockets do. No state, no threads.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Generator

from components import credentials
from components.address import Address
from components.errors import Unauthorized
from components.frames import left, read_exactly

_VERSION = b"dynmig1\n"
_NONCE = 32
_PROOF = 32

Steps = Generator[bytes | int, bytes, None]
"""Yields bytes to send, or a number of bytes to receive."""


def _proof(side: bytes, purpose: str, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return credentials.mac(_VERSION, side, purpose.encode(), server_nonce, client_nonce)


def accepting(purpose: str) -> Steps:
    """The listening side."""
    own = secrets.token_bytes(_NONCE)
    yield _VERSION + own
    answer = yield _NONCE + _PROOF
    theirs, proof = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(proof, _proof(b"client", purpose, own, theirs)):
        raise Unauthorized(f"whoever connected has not the secret in {credentials.VARIABLE}, or meant another process")
    yield _proof(b"server", purpose, own, theirs)


def connecting(purpose: str) -> Steps:
    """The connecting side."""
    hello = yield len(_VERSION) + _NONCE
    if not hello.startswith(_VERSION):
        raise Unauthorized("what listens there is no process of this system, or one of another version")
    theirs, own = hello[len(_VERSION) :], secrets.token_bytes(_NONCE)
    yield own + _proof(b"client", purpose, theirs, own)
    try:
        proof = yield _PROOF
    except ConnectionError as error:
        raise Unauthorized(
            f"it refused us: both need the same secret in {credentials.VARIABLE}, or it has started again since"
        ) from error
    if not hmac.compare_digest(proof, _proof(b"server", purpose, theirs, own)):
        raise Unauthorized(f"what listens there has not the secret in {credentials.VARIABLE}")


def greet(sock: socket.socket, steps: Steps, end: float) -> None:
    """Run one side on a connected socket, until ``end`` on ``time.monotonic``."""
    try:
        want = next(steps)
        while True:
            if isinstance(want, bytes):
                sock.settimeout(left(end))
                sock.sendall(want)
                want = next(steps)
                continue
            try:
                got = read_exactly(sock, want, end)
            except ConnectionError as error:
                want = steps.throw(error)
            else:
                want = steps.send(got)
    except StopIteration:
        return


def connect(address: str, purpose: str, end: float) -> socket.socket:
    """A connection to ``host:port`` after the proof of the other end."""
    sock = socket.create_connection(Address.of(address), timeout=left(end))
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greet(sock, connecting(purpose), end)
    except BaseException:
        sock.close()
        raise
    return sock
