# SPDX-License-Identifier: Apache-2.0
"""Decoders of bytes from other processes. Accepted values must also be safe to use."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import msgspec
import numpy as np
import torch

from components.errors import InvalidRequest
from components.handshake import accepting, connecting, greet
from components.messages import pack, unpack
from components.migration.messages import Attached, Handover, PlannerReply, WorkerCall, WorkerReply
from components.transfer.config import KVPool
from components.transfer.control import record
from components.transfer.control.directory import Directory
from components.transfer.control.record import AgentRecord
from components.transfer.data import handover
from components.transfer.data.handover import Mapping, map_peer
from components.transfer.data.tcp import TcpBackend
from components.transfer.layout import Segment, extents
from components.transfer.regions import regions_of
from components.transfer.session import messages as session
from components.transfer.shares import Shares
from components.wire import UNREADABLE
from components.worker import mocker_payload
from planner_hooks.observe import Observer
from planner_hooks.rules import Cost
from planner_hooks.table import Table
from tests.fuzz import samples
from tests.fuzz.inputs import Target
from tests.fuzz.samples import agent_record

BLOCKS = 8


@cache
def _own_record() -> AgentRecord:
    return agent_record()


def agent_records(data: bytes) -> None:
    """A record from etcd or NATS, then what is done with it before a byte moves."""
    peer = record.decode(data)
    _own_record().require_pairable(peer)
    # Only what cannot be paired may name segments that do not fit.
    near = np.arange(min(BLOCKS, max(0, peer.num_blocks)))
    extents(_own_record().segments(), peer.segments(), near, near)


def sealed(data: bytes, sender: str, receiver: str) -> bytes:
    """As a peer with the secret sends it."""
    return session.seal(data, sender, receiver) + data


def session_messages(data: bytes) -> None:
    """A NIXL notification."""
    message = session.decode(sealed(data, "a", "b"), "a", "b")
    if isinstance(message, session.Ask):
        session.unpack(message.src)
        session.unpack(message.dst)


def _known() -> Table:
    """A worker with requests."""
    table = Table("known")
    table.take(samples.states()[0], 0.0, first=True)
    return table


def endpoint_messages(data: bytes) -> None:
    """Every message of Dynamo's endpoints, and the envelope itself."""
    try:
        envelope = json.loads(data)
    except (ValueError, RecursionError):
        envelope = {"m": base64.b64encode(data).decode()}
    taken = 0
    for kind in (WorkerCall, WorkerReply, Attached, Handover, PlannerReply):
        try:
            message: msgspec.Struct = unpack(envelope, kind)
        except InvalidRequest:
            continue
        pack(message)
        taken += 1
        if isinstance(message, WorkerReply) and message.state is not None:
            for table in (Table("new"), _known()):
                table.take(message.state, 1.0, first=True)
                observer = Observer(Cost())
                observer.snapshot(observer.look([table], message.state.moves), 5.0)
    if not taken:
        raise InvalidRequest("none of the messages")


def tickets_of_vllm(data: bytes) -> None:
    """A request in vLLM's own form, from a worker that it leaves."""
    from components.engine.vllm import native

    given = native.decode(data)
    native.why_fixed({"prompt_token_ids": [1]}, given.params, given.keywords())
    native.encode(given)


def openai_payloads(data: bytes) -> None:
    """A request as the frontend hands it on, to a mocker."""
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(payload, dict):
        mocker_payload.to_request("r", payload, 100)


@contextmanager
def client(data: bytes) -> Iterator[socket.socket]:
    """The server's end of a connection whose client sends this and no more."""
    near, far = socket.socketpair()

    def send() -> None:
        with suppress(OSError):  # The server has closed.
            near.sendall(data)
            near.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield far
    finally:
        far.close()
        thread.join()
        near.close()


@cache
def _tcp() -> tuple[TcpBackend, torch.Tensor]:
    """A server whose pool has a guard of 64 blocks on either side."""
    whole = torch.zeros((BLOCKS + 128, 4, 2))
    pool = KVPool("layer.0", whole[64 : 64 + BLOCKS], BLOCKS, 0)
    return TcpBackend("mine", "mine", Shares(regions_of([pool])), "127.0.0.1", Directory()), whole


def tcp_requests(data: bytes) -> None:
    """What a peer that has proved itself sends to the plain TCP lane: a length, a request, and more."""
    backend, whole = _tcp()
    # What ``Acceptor`` ends a connection for.
    with client(struct.pack("!I", len(data)) + data + b"\x55" * 20_000) as connection, suppress(OSError, *UNREADABLE):
        backend._serve(connection)
    if whole.any():
        raise AssertionError("bytes were written")


def strangers(data: bytes) -> None:
    """A client without the secret."""
    with client(data) as connection, suppress(OSError):
        greet(connection, accepting("kv-tcp mine"), time.monotonic() + 5)
        raise AssertionError("a stranger was let in")


def impostors(data: bytes) -> None:
    """A server without the secret."""
    with client(data) as connection, suppress(OSError):
        greet(connection, connecting("kv-tcp mine"), time.monotonic() + 5)
        raise AssertionError("an impostor was believed")


def handover_answers(data: bytes) -> None:
    """A peer's answer to the request for its pools."""
    epoch = uuid.uuid4().hex
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(handover.name_of(epoch))
    server.listen()

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            with suppress(OSError):
                greet(connection, accepting(handover.purpose(epoch)), time.monotonic() + 5)
                connection.sendall(struct.pack("!I", len(data)) + data)
            fd = os.memfd_create("fuzz")
            os.ftruncate(fd, 4096)
            try:
                socket.send_fds(connection, [b"f"], [fd])
            except OSError:
                return
            finally:
                os.close(fd)

    thread = threading.Thread(target=answer)
    thread.start()
    mapping: Mapping | None = None
    try:
        mapping = map_peer("peer", epoch, time.monotonic() + 5)
        for segment in (Segment(0, 1, 1), Segment(4096, 4097, 8), Segment(1 << 40, 8, 8)):
            mapping.seen(segment, 2)
    finally:
        if mapping is not None:
            mapping.close()
        thread.join()
        server.close()


TARGETS = [
    Target("record", agent_records),
    Target("session", session_messages),
    Target("messages", endpoint_messages),
    Target("native", tickets_of_vllm),
    Target("openai", openai_payloads, "json"),
    Target("tcp", tcp_requests),
    Target("handshake", strangers),
    Target("handshake-answer", impostors),
    Target("handover-answer", handover_answers),
]
