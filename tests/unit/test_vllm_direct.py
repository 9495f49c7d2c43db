# SPDX-License-Identifier: Apache-2.0
"""Commits from engine to engine: real vLLM schedulers and real sockets, played step by step.

The worker's own commit always follows; whatever becomes of the direct one, it finds the landing as it must be.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from components.engine.kv import CommitTo, Frozen, RequestId
from components.engine.vllm.control import Call, Marker, Op, Reply, encode
from components.errors import NoRoom, RequestNotFound, SessionError, Unauthorized
from components.frames import framed, read_exactly
from components.handshake import accepting, connect, greet
from tests.vllm_scheduler import BLOCK, Played, offer_of

pytest.importorskip("vllm")
from components.engine.vllm import direct  # noqa: E402
from components.engine.vllm.compat import core as core_module  # noqa: E402

PROMPT = list(range(1, 41))
MOVED = "moved"


def reply(answer: Reply | Future[Reply]) -> Reply:
    assert isinstance(answer, Reply)
    return answer


class Target(Played):
    """A scheduler that takes commits from other engines."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.came = threading.Semaphore(0)
        self.scheduler.migration.incoming.inbox.listen(self.came.release)

    def landed(self, name: str = MOVED, tokens: int = 41, **sampling: Any) -> Any:
        """A request whose first round of blocks is here."""
        marker = Marker(RequestId(name), tokens - 1, landing=offer_of(name, tokens - 1))
        request = self.add([*PROMPT, 7][:tokens], marker, name, **sampling)
        output = self.step()
        self.step(self.done(*self.jobs(output)))
        return request

    def to(self, request: Any) -> CommitTo:
        status = reply(self.call(Op.LANDING, request)).landing
        assert status is not None and status.landed and status.commit_to is not None
        return status.commit_to

    def wait(self) -> None:
        assert self.came.acquire(timeout=30)

    def is_direct(self, request: Any) -> bool:
        status = reply(self.call(Op.LANDING, request)).landing
        assert status is not None and status.commit_to is None
        return status.direct


@pytest.fixture
def playing() -> Iterator[Callable[[Any], Any]]:
    ends = contextlib.ExitStack()

    def keep(made: Any) -> Any:
        ends.callback(made.close if isinstance(made, direct.Outbox) else made.scheduler.migration.close)
        return made

    with ends:
        yield keep


@pytest.fixture
def target(tiny_llama: str, playing: Callable[[Any], Any]) -> Any:
    return playing(Target(tiny_llama))


@pytest.fixture
def outbox(playing: Callable[[Any], Any]) -> Any:
    return playing(direct.Outbox())


def state(tokens: tuple[int, ...] = (7, 7), computed: int = 41, **more: Any) -> Frozen:
    return Frozen(offer_of(MOVED, computed), tokens, **more)


def end(played: Played, request: Any) -> None:
    from vllm.v1.request import RequestStatus

    played.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)


@pytest.mark.parametrize("ahead", [False, True], ids=["nothing in flight", "a step in flight"])
def test_the_source_s_engine_commits_and_the_worker_s_commit_changes_nothing(
    tiny_llama: str, target: Any, playing: Callable[[Any], Any], ahead: bool
) -> None:
    source = playing(Played(tiny_llama, "AsyncMigrationScheduler" if ahead else "MigrationScheduler"))
    running = source.add(PROMPT, name=MOVED)
    source.step()
    landing = target.landed()
    under_way = source.schedule() if ahead else None
    answer = source.call(Op.FREEZE, running, commit_to=target.to(landing), use_within_s=5.0)
    if under_way is not None:
        assert not target.came.acquire(timeout=0.2)
        source.finish_step(under_way)
        answer = answer.result(0)
    frozen = reply(answer).frozen
    assert frozen is not None and len(frozen.output_token_ids) == 1 + ahead

    target.wait()
    assert target.schedule().num_scheduled_tokens == {landing.request_id: 1}
    assert tuple(landing.output_token_ids) == frozen.output_token_ids
    jobs = list(target.executor.jobs)
    assert len(jobs) == 1 and 0 < jobs[0].deadline_s <= 5.0
    assert target.is_direct(landing)
    assert target.scheduler.migration.untold == {landing.request_id: encode(frozen.output_token_ids)}
    target.call(Op.COMMIT, MOVED, frozen=msgspec.structs.replace(frozen, use_within_s=9.0))
    assert not target.scheduler.migration.untold
    assert target.executor.jobs == jobs
    with pytest.raises(SessionError, match="other tokens"):
        target.call(Op.COMMIT, MOVED, frozen=msgspec.structs.replace(frozen, output_token_ids=(8, 8)))
    end(target, landing)
    target.check()


def test_commits_that_come_together_are_copied_together(target: Any, outbox: Any) -> None:
    landings = [target.landed(name) for name in ("one", "two", "three")]
    for landing in landings:
        to = target.to(landing)
        outbox.open(to)
        outbox.send(to, state())
    for _ in landings:
        target.wait()
    target.executor.calls.clear()
    assert target.schedule().num_scheduled_tokens == {landing.request_id: 1 for landing in landings}
    assert target.executor.calls == [3]
    for landing in landings:
        end(target, landing)
    target.check()


def test_requests_that_a_step_sets_free_are_frozen_together(tiny_llama: str, playing: Callable[[Any], Any]) -> None:
    source = playing(Played(tiny_llama, "AsyncMigrationScheduler"))
    running = [source.add(PROMPT, name=name) for name in ("one", "two")]
    source.step()
    under_way = source.schedule()
    answers = [source.call(Op.FREEZE, request) for request in running]
    source.finish_step(under_way)
    assert all(len(answer.result(0).frozen.output_token_ids) == 2 for answer in answers)
    assert source.executor.frozen == [2]


def test_without_anybody_to_commit_to_nothing_is_sent(
    tiny_llama: str, target: Any, playing: Callable[[Any], Any]
) -> None:
    source = playing(Played(tiny_llama))
    running = source.add(PROMPT, name=MOVED)
    source.step()
    landing = target.landed()
    frozen = reply(source.call(Op.FREEZE, running)).frozen
    target.step()
    assert target.to(landing)
    target.call(Op.COMMIT, landing, frozen=frozen)
    assert not target.is_direct(landing) and not target.came.acquire(blocking=False)


def test_a_source_that_went_on_before_its_state_was_made_sends_none(
    tiny_llama: str, target: Any, playing: Callable[[Any], Any]
) -> None:
    source = playing(Played(tiny_llama, "AsyncMigrationScheduler"))
    running = source.add(PROMPT, name=MOVED)
    source.step()
    under_way = source.schedule()
    source.call(Op.FREEZE, running, commit_to=target.to(target.landed()))
    source.call(Op.RESUME, running)
    source.finish_step(under_way)
    assert source.step().num_scheduled_tokens and not target.came.acquire(timeout=0.2)


def test_a_direct_commit_that_finds_no_room_leaves_it_to_the_worker_s(
    tiny_llama: str, outbox: Any, playing: Callable[[Any], Any]
) -> None:
    target = playing(Target(tiny_llama, blocks=6))
    neighbour = target.add(list(range(100, 100 + 2 * BLOCK + 1)))
    target.step()
    landing = target.landed(tokens=2 * BLOCK)
    to = target.to(landing)
    outbox.open(to)
    frozen = state((PROMPT[2 * BLOCK - 1], 7), 2 * BLOCK + 1)
    outbox.send(to, frozen)
    target.wait()
    target.step()
    assert target.to(landing) == to, "it still waits for its commit"
    with pytest.raises(NoRoom):
        target.call(Op.COMMIT, landing, frozen=frozen)
    end(target, neighbour)
    target.step()
    target.call(Op.COMMIT, landing, frozen=frozen)
    assert landing.request_id in target.step().num_scheduled_tokens
    assert not target.is_direct(landing)
    target.check()


def test_a_direct_commit_for_a_life_that_is_over_does_not_reach_the_next_one(target: Any, outbox: Any) -> None:
    first = target.landed()
    to = target.to(first)
    outbox.open(to)
    end(target, first)
    target.step()
    second = target.landed()
    outbox.send(to, state())
    target.wait()
    assert not target.step().num_scheduled_tokens
    assert target.to(second) != to
    end(target, second)
    target.step()
    outbox.send(to, state())
    target.wait()
    target.step()
    target.check()


def test_a_request_that_ends_before_its_worker_has_committed_it_has_been_committed(target: Any, outbox: Any) -> None:
    landing = target.landed(max_tokens=3)
    to = target.to(landing)
    outbox.open(to)
    outbox.send(to, state())
    target.wait()
    assert target.step().num_scheduled_tokens and landing.is_finished()
    target.call(Op.COMMIT, MOVED, frozen=state())
    with pytest.raises(SessionError, match="other tokens"):
        target.call(Op.COMMIT, MOVED, frozen=state((7, 8)))
    target.landed()
    target.call(Op.COMMIT, MOVED, frozen=state((7, 8)))


def test_a_request_that_was_aborted_has_not_been_committed(target: Any, outbox: Any) -> None:
    landing = target.landed()
    to = target.to(landing)
    outbox.open(to)
    outbox.send(to, state())
    target.wait()
    target.step()
    end(target, landing)
    with pytest.raises(RequestNotFound):
        target.call(Op.COMMIT, MOVED, frozen=state())


def test_a_pause_for_a_commit_ends_with_the_direct_one(tiny_llama: str, outbox: Any) -> None:
    played = Played(tiny_llama)
    core: Any = SimpleNamespace(scheduler=played.scheduler, model_executor=played.executor, input_queue=queue.Queue())
    handled: list[Any] = []
    core._handle_client_request = lambda *request: handled.append(request)
    core_module.kv_control(core, encode(Call(Op.INFO)))
    core_module.kv_control(core, encode(Call(Op.INFO)))
    try:
        landing = Target.landed(played)  # type: ignore[arg-type]
        to = Target.to(played, landing)  # type: ignore[arg-type]
        outbox.open(to)
        outbox.send(to, state())
        core_module.Hold().until_commit(core, Call(Op.EXPECT_COMMIT, RequestId(MOVED), hold_s=60.0))
        assert not played.scheduler.migration.expects_commit(RequestId(MOVED))
        # The wake-up came out of the queue, as no call of anybody's that would be answered.
        assert [kind.name for kind, _ in handled] in (["WAKEUP"], [])
    finally:
        played.scheduler.shutdown()
    with pytest.raises(OSError):
        connect(to.address, direct.purpose(to.epoch), time.monotonic() + 30)


def test_nothing_is_taken_from_a_stranger(target: Any, outbox: Any) -> None:
    landing = target.landed()
    to = target.to(landing)
    with pytest.raises(Unauthorized):
        connect(to.address, direct.purpose("another life"), time.monotonic() + 30)
    stranger = msgspec.structs.replace(to, epoch="another life")
    outbox.open(stranger)
    outbox.send(stranger, state())
    host, _, port = to.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock, contextlib.suppress(OSError):
        sock.sendall(framed(encode(Call(Op.COMMIT, to.request_id, frozen=state()))) + bytes(64))
        while sock.recv(4096):
            pass
    target.step()
    assert target.to(landing) == to and not target.came.acquire(blocking=False)


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff\xff\xff",
        framed(b"\x00" * 100),
        framed(encode(Call(Op.RELEASE, RequestId(MOVED)))),
        framed(encode(Call(Op.COMMIT, RequestId(MOVED)))),
    ],
    ids=["too long", "no message", "another call", "no state"],
)
def test_a_peer_that_sends_anything_else_is_cut_off(target: Any, outbox: Any, said: bytes) -> None:
    landing = target.landed()
    to = target.to(landing)
    with connect(to.address, direct.purpose(to.epoch), time.monotonic() + 30) as sock:
        sock.settimeout(30)
        sock.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert not target.came.acquire(blocking=False)
    outbox.open(to)
    outbox.send(to, state())
    target.wait()


class Listener:
    """What listens instead of an engine; it proves itself and does with a connection what it is told to."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._serve = serve
        self.served = threading.Semaphore(0)
        self.to = CommitTo(f"127.0.0.1:{self._server.getsockname()[1]}", "e", RequestId(MOVED))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection:
                    greet(connection, accepting(direct.purpose("e")), time.monotonic() + 30)
                    self._serve(connection)
                self.served.release()

    def close(self) -> None:
        self._server.close()


def test_sending_waits_for_nobody_and_what_does_not_go_at_once_goes_later(outbox: Any) -> None:
    go, got = threading.Event(), []

    def serve(connection: socket.socket) -> None:
        go.wait(30)
        for _ in range(4):
            size = int.from_bytes(read_exactly(connection, 4, time.monotonic() + 30), "big")
            got.append(msgspec.msgpack.decode(read_exactly(connection, size, time.monotonic() + 30), type=Call))

    listener = Listener(serve)
    outbox.open(listener.to)
    states = [state(tuple(range(n, 1_000_000))) for n in range(4)]
    for frozen in states:
        outbox.send(listener.to, frozen)
    go.set()
    assert listener.served.acquire(timeout=60)
    assert [call.frozen for call in got] == states
    listener.close()


def test_a_connection_that_was_cut_is_made_again_for_the_next_move(outbox: Any) -> None:
    listener = Listener(lambda connection: None)
    outbox.open(listener.to)
    assert listener.served.acquire(timeout=30)
    outbox.send(listener.to, state())
    for _ in range(2000):
        outbox.open(listener.to)
        outbox.send(listener.to, state())
        if listener.served.acquire(timeout=0.01):
            break
    else:
        pytest.fail("no second connection")
    listener.close()


def test_peers_that_are_not_there_or_never_prove_themselves_cost_nothing(
    outbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_PEERS", 2)
    silent = socket.create_server(("127.0.0.1", 0))
    for number in range(5):
        for address in (f"127.0.0.1:{silent.getsockname()[1]}", "127.0.0.1:1", "no address", "a.invalid:5"):
            to = CommitTo(address, str(number), RequestId(MOVED))
            outbox.open(to)
            outbox.send(to, state())
    assert len(outbox._lines) == 2
    silent.close()


def test_an_engine_that_cannot_listen_is_committed_to_by_workers_alone(target: Any) -> None:
    inbox = direct.Inbox("192.0.2.1")
    inbox.listen(lambda: None)
    assert inbox.at("one") is None
    inbox.close()
