# SPDX-License-Identifier: Apache-2.0
"""The client's token sequence while its request changes workers, in every order that messages can arrive in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from components.engine.protocol import (
    AgentName,
    AgentRef,
    Epoch,
    FinishReason,
    Frozen,
    GenerateOutput,
    GenerateRequest,
    KVOffer,
    LandingStatus,
    RequestId,
)
from components.errors import MigrateError, SessionError, WorkerLost
from components.messages import Generate, Mode, WorkerOp, WorkerReply
from components.migration.move import hand_over, migrate
from tests.unit.told import ToldStream

REQUEST = GenerateRequest(RequestId("r"), (1, 2, 3, 4))
OFFER = KVOffer(RequestId("r"), (AgentRef(AgentName("a"), Epoch("1")),), 2, (0, 1, 2, 3), 8, 0)


def frozen(count: int) -> Frozen:
    """State after ``count`` output tokens; token ``i`` is 100 + i."""
    return Frozen(OFFER, tuple(100 + i for i in range(count)))


def token(index: int, count: int = 1, **more: Any) -> GenerateOutput:
    """The output that the one correct engine would give."""
    return GenerateOutput(index, tuple(100 + i for i in range(index, index + count)), **more)


END = GenerateOutput(0, finish_reason=FinishReason.FROZEN)


class ScriptedWorker:
    """Gives what the test puts in, and answers calls with what the test says."""

    def __init__(self, name: str, role: str = "decode") -> None:
        self.name = name
        self.lease_s = 60.0
        self.role = role
        self.streams = self.moving = self.tokens = self.prompt_tokens = self.prompts = 0
        self.channel = None
        self.calls: list[WorkerOp] = []
        self.on: dict[WorkerOp, Callable[[], Awaitable[WorkerReply | None]]] = {}
        self.out: asyncio.Queue[GenerateOutput | MigrateError] = asyncio.Queue()

    async def generate(self, message: Generate, context: Any) -> AsyncIterator[GenerateOutput]:
        while True:
            item = await self.out.get()
            if isinstance(item, MigrateError):
                raise item
            yield item

    async def call(self, op: WorkerOp, request_id: str = "", **more: Any) -> WorkerReply:
        self.calls.append(op)
        reply = await self.on[op]() if op in self.on else None
        if reply is not None:
            return reply
        match op:
            case WorkerOp.OFFER:
                return WorkerReply(offer=OFFER)
            case WorkerOp.LANDING:
                return WorkerReply(landing=LandingStatus(reserved=True, landed_tokens=8, rounds=1))
            case WorkerOp.FREEZE:
                return WorkerReply(frozen=frozen(5))
            case WorkerOp.RELEASE:
                self.out.put_nowait(END)
        return WorkerReply()


async def begin(role: str = "decode", deadline_s: float = 5.0) -> tuple[ToldStream, ScriptedWorker, ScriptedWorker]:
    """A request with three tokens out."""
    source, target = ScriptedWorker("source", role), ScriptedWorker("target")
    stream = ToldStream(REQUEST, deadline_s)
    stream.owner = stream.open(source)  # type: ignore[arg-type]
    source.out.put_nowait(token(0, 3))
    while len(stream.tokens) < 3:
        await asyncio.sleep(0)
    return stream, source, target


async def rest(stream: ToldStream) -> list[int]:
    """Token ids that the client gets until the request ends."""
    got: list[int] = []
    while True:
        item = await asyncio.wait_for(stream.outputs.get(), 5.0)
        if isinstance(item, MigrateError):
            raise item
        got += item.token_ids
        if item.finish_reason is not None:
            return got


def expected(count: int) -> list[int]:
    """All tokens of the request."""
    return [100 + i for i in range(count)]


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.STOP_AND_COPY, Mode.REPLAY])
@pytest.mark.parametrize("late_source", [False, True])
async def test_every_mode_delivers_each_token_once(mode: Mode, late_source: bool) -> None:
    stream, source, target = await begin()

    async def freeze() -> None:
        if not late_source:
            source.out.put_nowait(token(3, 2))
        for index in range(5, 8):
            target.out.put_nowait(token(index))

    async def release() -> WorkerReply:
        if late_source:
            source.out.put_nowait(token(3, 2))
        source.out.put_nowait(END)
        return WorkerReply()

    source.on = {WorkerOp.FREEZE: freeze, WorkerOp.RELEASE: release}  # type: ignore[dict-item]
    record = await migrate(stream, target, mode, 4)  # type: ignore[arg-type]
    target.out.put_nowait(token(8, 2, finish_reason=FinishReason.LENGTH))
    assert await rest(stream) == expected(10)
    assert record.ok, record.reason
    assert stream.moves == 1


async def test_first_tokens_that_overtake_the_answer_to_commit_are_kept() -> None:
    stream, source, target = await begin()

    async def commit() -> None:
        source.out.put_nowait(token(3, 2))
        for index in range(5, 9):
            target.out.put_nowait(token(index))
        await asyncio.sleep(0.05)

    target.on = {WorkerOp.COMMIT: commit}  # type: ignore[dict-item]
    record = await migrate(stream, target, Mode.LIVE, 4)  # type: ignore[arg-type]
    assert record.ok, record.reason
    target.out.put_nowait(token(9, 1, finish_reason=FinishReason.STOP))
    assert await rest(stream) == expected(10)


async def test_the_end_may_come_with_the_first_token_of_the_target() -> None:
    stream, source, target = await begin()

    async def commit() -> None:
        source.out.put_nowait(token(3, 2))
        target.out.put_nowait(token(5, 1, finish_reason=FinishReason.STOP))
        await asyncio.sleep(0.05)

    target.on = {WorkerOp.COMMIT: commit}  # type: ignore[dict-item]
    record = await migrate(stream, target, Mode.LIVE, 4)  # type: ignore[arg-type]
    assert record.ok, record.reason
    assert await rest(stream) == expected(6)


async def test_tokens_that_a_dying_source_never_delivered_come_from_its_state() -> None:
    stream, source, target = await begin()

    async def freeze() -> None:
        source.out.put_nowait(WorkerLost("killed"))
        target.out.put_nowait(token(5))

    source.on = {WorkerOp.FREEZE: freeze}  # type: ignore[dict-item]
    record = await migrate(stream, target, Mode.STOP_AND_COPY, 4)  # type: ignore[arg-type]
    assert record.ok, record.reason
    target.out.put_nowait(token(6, 1, finish_reason=FinishReason.STOP))
    assert await rest(stream) == expected(7)


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.STOP_AND_COPY, Mode.REPLAY])
async def test_a_target_that_dies_gives_the_request_back(mode: Mode) -> None:
    stream, source, target = await begin()
    target.on = {WorkerOp.COMMIT: lambda: _raise(WorkerLost("killed"))}
    target.out.put_nowait(WorkerLost("killed"))

    async def resume() -> None:
        source.out.put_nowait(token(3, 4, finish_reason=FinishReason.STOP))

    source.on = {WorkerOp.RESUME: resume}  # type: ignore[dict-item]
    record = await migrate(stream, target, mode, 4)  # type: ignore[arg-type]
    assert not record.ok
    assert "killed" in record.reason
    assert await rest(stream) == expected(7)


async def test_a_target_without_a_token_gives_the_request_back_after_the_deadline() -> None:
    stream, source, target = await begin(deadline_s=0.1)

    async def resume() -> None:
        # Late tokens of the target must not mix with those of the source.
        target.out.put_nowait(token(5, 2))
        await asyncio.sleep(0.02)
        source.out.put_nowait(token(3, 4, finish_reason=FinishReason.STOP))

    source.on = {WorkerOp.RESUME: resume}  # type: ignore[dict-item]
    record = await migrate(stream, target, Mode.LIVE, 4)  # type: ignore[arg-type]
    assert record.reason.startswith("deadline")
    assert WorkerOp.ABORT in target.calls
    assert await rest(stream) == expected(7)


async def test_all_steps_from_the_freeze_on_end_within_the_lease_of_the_source() -> None:
    stream, source, target = await begin(deadline_s=1000.0)
    source.lease_s = 0.3
    source.on = {WorkerOp.RESUME: lambda: source.out.put(token(3, 4, finish_reason=FinishReason.STOP))}  # type: ignore[dict-item]
    record = await asyncio.wait_for(migrate(stream, target, Mode.STOP_AND_COPY, 4), 60.0)  # type: ignore[arg-type]
    assert (record.reason, await rest(stream)) == ("deadline: no token from worker target within 0.1 s", expected(7))


async def test_losing_source_and_target_is_told_to_the_reader() -> None:
    stream, source, target = await begin()

    async def commit() -> None:
        source.out.put_nowait(WorkerLost("source killed"))
        target.out.put_nowait(WorkerLost("target killed"))
        await asyncio.sleep(0.01)

    target.on = {WorkerOp.COMMIT: commit}  # type: ignore[dict-item]
    record = await migrate(stream, target, Mode.LIVE, 4)  # type: ignore[arg-type]
    assert not record.ok
    with pytest.raises(WorkerLost, match="source killed"):
        await rest(stream)


async def test_a_replay_after_a_loss_continues_where_the_client_is() -> None:
    stream, source, target = await begin()
    source.out.put_nowait(WorkerLost("killed"))
    while not isinstance(await stream.outputs.get(), MigrateError):
        pass
    stream.replace_owner(target)  # type: ignore[arg-type]
    target.out.put_nowait(token(3, 2, finish_reason=FinishReason.STOP))
    assert (await rest(stream))[-2:] == expected(5)[-2:]
    assert stream.tokens == expected(5)


async def test_missing_tokens_are_an_error_and_not_silence() -> None:
    stream, source, _ = await begin()
    source.out.put_nowait(token(5))
    with pytest.raises(SessionError, match="2 tokens are missing after 3"):
        await rest(stream)


async def test_a_gap_is_told_once_and_what_comes_after_it_is_ignored() -> None:
    stream, source, target = await begin()
    for index in (5, 6, 7):
        source.out.put_nowait(token(index))
    source.out.put_nowait(WorkerLost("and then it dies"))
    assert stream.owner is not None
    await stream.owner.ended.wait()
    stream.replace_owner(target)  # type: ignore[arg-type]
    target.out.put_nowait(token(3, 2, finish_reason=FinishReason.LENGTH))
    items = [await asyncio.wait_for(stream.outputs.get(), 5.0) for _ in range(3)]
    assert [type(item) for item in items] == [GenerateOutput, SessionError, GenerateOutput]
    assert stream.tokens == expected(5) and stream.outputs.empty()


async def test_hand_over_failure_leaves_the_prefill_worker_the_owner() -> None:
    stream, source, target = await begin("prefill")
    target.out.put_nowait(WorkerLost("killed"))
    with pytest.raises(WorkerLost):
        await hand_over(stream, target, frozen(3))  # type: ignore[arg-type]
    source.out.put_nowait(token(3, 1, finish_reason=FinishReason.STOP))
    assert await rest(stream) == expected(4)


async def test_a_request_in_prefill_is_not_moved() -> None:
    stream, _, target = await begin("prefill")
    record = await migrate(stream, target, Mode.LIVE, 4)  # type: ignore[arg-type]
    assert record.reason == "the request is still in prefill"


async def _raise(error: Exception) -> WorkerReply:
    raise error


async def test_the_echo_of_an_abort_does_not_end_the_answer() -> None:
    stream, source, target = await begin(deadline_s=0.1)

    async def abort() -> None:
        target.out.put_nowait(GenerateOutput(5, finish_reason=FinishReason.CANCELLED))
        await asyncio.sleep(0.02)

    async def resume() -> None:
        source.out.put_nowait(token(3, 4, finish_reason=FinishReason.STOP))

    target.on = {WorkerOp.ABORT: abort}  # type: ignore[dict-item]
    source.on = {WorkerOp.RESUME: resume}  # type: ignore[dict-item]
    record = await migrate(stream, target, Mode.LIVE, 4)  # type: ignore[arg-type]
    assert record.reason.startswith("deadline")
    assert await rest(stream) == expected(7)


async def test_an_owner_that_cancels_unasked_counts_as_lost() -> None:
    stream, source, _ = await begin()
    source.out.put_nowait(GenerateOutput(3, finish_reason=FinishReason.CANCELLED))
    with pytest.raises(WorkerLost, match="cancelled"):
        await rest(stream)
