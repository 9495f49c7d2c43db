# SPDX-License-Identifier: Apache-2.0
"""Calls to other workers: to their ``migrate`` endpoints over Dynamo's request plane, or over a worker's links.

Errors: the peer's; ``WorkerLost`` when it is unreachable or closes a call without an answer;
``DeadlineExceeded`` after the caller's time-out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from components.engine.kv import RequestId
from components.engine.protocol import GenerateOutput
from components.errors import DeadlineExceeded, MigrateError, WorkerLost, from_code
from components.messages import pack, unpack
from components.migration.legs import join
from components.migration.links import Links
from components.migration.messages import Attached, Owner, WorkerCall, WorkerOp, WorkerReply, WorkerState

logger = logging.getLogger(__name__)
OPEN_S = 20.0
STATUS_S = 2.0


def short(instance: int) -> str:
    """A worker's short name. Instance ids of one etcd differ only in their last digits."""
    return f"{instance:016x}"[-8:]


class Peers:
    """Other workers, by Dynamo's clients of the components with migrating workers."""

    def __init__(self, clients: list[Any]) -> None:
        self._clients = clients
        self._own: Any = None
        self._first: list[Any] | None = None
        self._links: Links | None = None

    @classmethod
    async def connect(cls, runtime: Any, namespace: str, components: Sequence[str]) -> Peers:
        """Clients of ``<namespace>.<component>.migrate`` for each component."""
        names = dict.fromkeys(components)
        return cls([await runtime.endpoint(f"{namespace}.{name}.migrate").client() for name in names])

    @classmethod
    async def of_worker(
        cls, runtime: Any, namespace: str, component: str, own: Any, others: Sequence[str], role: str
    ) -> Peers:
        """For a worker that serves ``own``, the endpoint to which frontends send its requests."""
        peers = await cls.connect(runtime, namespace, [component, *others])
        peers._own = await own.client()
        peers._links = Links(peers._ask)
        if role == "decode":
            stages = [name for name in dict.fromkeys(others) if name != component]
            peers._first = [await runtime.endpoint(f"{namespace}.{name}.generate").client() for name in stages]
        return peers

    def siblings(self) -> list[int]:
        """Workers between which the frontend chooses, this one included, cordoned ones excluded."""
        return [] if self._own is None else sorted(self._own.instance_ids())

    def prefill_workers(self) -> list[int] | None:
        """Prefill workers, one of which gets a request before one of ``siblings``; None without such a stage."""
        if self._first is None:
            return None
        return sorted({instance for client in self._first for instance in client.instance_ids()})

    def instances(self) -> list[int]:
        """Callable workers of all roles."""
        return sorted({instance for client in self._clients for instance in client.instance_ids()})

    def _client(self, instance: int) -> Any:
        for client in self._clients:
            if instance in client.instance_ids():
                return client
        raise WorkerLost(f"worker {short(instance)} is not known to Dynamo's discovery")

    async def call(self, instance: int, call: WorkerCall, timeout_s: float = 20.0) -> WorkerReply:
        """One call and its answer."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._links is None:
                    reply = await self._ask(instance, call)
                else:
                    self._client(instance)
                    reply = await self._links.ask(instance, call)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"worker {short(instance)} did not answer {call.op} within {timeout_s:g} s"
            ) from error
        if reply.error is not None:
            raise from_code(*reply.error)
        return reply

    def attach(
        self, owner: Owner, request_id: RequestId, index: int, token_ids: tuple[int, ...] = ()
    ) -> AsyncGenerator[Attached, None]:
        """Read a request at ``owner``, from output token ``index`` on, or from the one after ``token_ids``.

        Only for the peers of a worker.
        """
        if self._links is None:
            raise WorkerLost("only workers read requests of others")
        call = WorkerCall(WorkerOp.ATTACH, request_id, owner.life, index=index, tokens=token_ids)
        return self._links.attach(owner.instance, call)

    async def _ask(self, instance: int, call: WorkerCall) -> WorkerReply:
        """One call over Dynamo."""
        reply: WorkerReply | None = None
        try:
            # To the end of the stream: both sides would log an early end as a cancelled call.
            async for item in await self._client(instance).direct(pack(call), instance, annotated=False):
                reply = unpack(item, WorkerReply)
        except MigrateError:
            raise
        except Exception as error:
            raise WorkerLost(f"worker {short(instance)}: {error}") from error
        if reply is None:
            raise WorkerLost(f"worker {short(instance)} closed the call {call.op} without an answer")
        return reply


async def states_of(peers: Peers, instances: Sequence[int]) -> dict[int, WorkerState]:
    """States of workers without their requests. A worker that does not answer within ``STATUS_S`` is left out."""
    call = WorkerCall(WorkerOp.STATUS, requests=False)
    asked = (peers.call(instance, call, STATUS_S) for instance in instances)
    replies = zip(instances, await asyncio.gather(*asked, return_exceptions=True), strict=True)
    return {i: r.state for i, r in replies if not isinstance(r, BaseException) and r.state is not None}


async def tell_others(peers: Peers, own: int, call: WorkerCall, timeout_s: float, what: str) -> frozenset[int]:
    """Make a call to all workers but this one. Returns those that have answered; ``what`` the others do not know."""
    others = [instance for instance in peers.instances() if instance != own]
    told = (peers.call(instance, call, timeout_s) for instance in others)
    know = set()
    for other, answer in zip(others, await asyncio.gather(*told, return_exceptions=True), strict=True):
        if isinstance(answer, Exception):
            logger.warning("worker %s was not told %s: %s", short(other), what, answer)
        else:
            know.add(other)
    return frozenset(know)


async def _opened(stream: AsyncGenerator[Attached, None], owner: Owner) -> Attached | None:
    """The first item, which must arrive within ``OPEN_S``; a living worker sends it at once. None: there is none."""
    try:
        async with asyncio.timeout(OPEN_S):
            return await anext(stream, None)
    except TimeoutError as error:
        raise WorkerLost(f"worker {short(owner.instance)} did not take a reader within {OPEN_S:g} s") from error


Attach = Callable[[Owner, RequestId, int, tuple[int, ...]], AsyncGenerator[Attached, None]]


async def follow(
    attach: Attach,
    owner: Owner,
    request_id: RequestId,
    index: int,
    moved: Callable[[Owner], None] | None = None,
    token_ids: tuple[int, ...] = (),
    opened: Callable[[], object] | None = None,
) -> AsyncGenerator[GenerateOutput, None]:
    """Outputs of a request across its owners. ``moved`` is called with each next owner, ``opened`` once the first
    owner has the reader.

    Raises the owner's error, and ``WorkerLost`` when its engine has died or a stream ends before the request.
    """
    while True:
        heir: Owner | None = None
        async with aclosing(attach(owner, request_id, index, token_ids)) as stream:
            item = await _opened(stream, owner)
            while item is not None:
                if item.error is not None:
                    raise from_code(*item.error)
                if opened is not None:
                    opened()
                for output in join(item.outputs):
                    if output.error is not None and output.error[0] == WorkerLost.code:
                        raise WorkerLost(output.error[1])
                    index, token_ids = output.index + len(output.token_ids), ()
                    yield output
                    if output.finish_reason is not None:
                        return
                if item.moved is not None:
                    heir = item.moved
                    break
                item = await anext(stream, None)
        if heir is None:
            raise WorkerLost(f"worker {short(owner.instance)} closed the stream of request {request_id}")
        owner = heir
        if moved is not None:
            moved(owner)
