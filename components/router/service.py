# SPDX-License-Identifier: Apache-2.0
"""The router's Dynamo endpoints, and the life of one request from first to last token.

A request goes to a prefill worker, which gives the first token and freezes it, then to a decode worker; when no
prefill worker is there, or the prompt is short, to a decode worker alone. A lost worker means token replay on
another one, up to ``replay_limit`` times. While no decode worker is there, a prefill worker does it all. Errors reach
the client as Dynamo's own exceptions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from components import process
from components.engine.protocol import FinishReason, Frozen, GenerateOutput
from components.errors import InvalidRequest, MigrateError, NoRoom, RequestNotFound
from components.messages import (
    Decision,
    EventKind,
    RouterCall,
    RouterOp,
    RouterReply,
    StreamInfo,
    Verdict,
    WorkerOp,
    pack,
    unpack,
)
from components.metrics.export import address
from components.metrics.router import RouterMetrics
from components.metrics.traces import export
from components.migration.move import hand_over
from components.router.answer import Answer
from components.router.mover import Mover
from components.router.openai import Responder, default_sampling, has_stop_strings, to_request
from components.router.stream import Stream
from components.router.workers import Worker, WorkerPool
from components.serve.config import RouterConfig

logger = logging.getLogger(__name__)
_SILENCE_CHECK_S = 0.5
_SHUN_ROUNDS = 10
"""Half seconds to wait for a worker that has not just failed the request: a dead one stays listed for its lease."""


class RouterService:
    """All streams of one router."""

    def __init__(self, config: RouterConfig, runtime: Any, tokenizer: Any) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._tokenizer = tokenizer
        self._defaults = default_sampling(config.model)
        self.pool = WorkerPool(
            *(runtime, process.namespace(), self._worker_drains, config.placement == "round-robin"),
            channels=config.output_channels,
        )
        self.streams: dict[str, Stream] = {}
        self.ended: deque[StreamInfo] = deque(maxlen=200)
        self._decisions: deque[Decision] = deque(maxlen=200)
        self._left_alone: tuple[Decision, ...] = ()
        self.metrics = RouterMetrics(self.streams.values, self.pool.workers.values)
        self.mover = Mover(config, self.pool, self.streams, self.metrics)
        self._tasks: set[asyncio.Task[Any]] = set()

    def generate(self, payload: Any, context: Any) -> Answer:
        """Endpoint for Dynamo's frontend, called on a thread of Dynamo's."""
        answer = Answer(self._loop)
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._serve(payload, context, answer)))
        return answer

    async def _serve(self, payload: dict[str, Any], context: Any, answer: Answer) -> None:
        from dynamo.llm.exceptions import InvalidArgument, Unknown

        error: Exception | None = Unknown("the router was stopped")
        try:
            await self._respond(payload, context, answer)
            error = None
        except InvalidRequest as wrong:
            error = InvalidArgument(str(wrong))
        except MigrateError as failed:
            error = Unknown(f"{failed.code}: {failed}")
        except Exception as unexpected:
            error = Unknown(f"{type(unexpected).__name__}: {unexpected}")
            raise
        finally:
            answer.end(error)

    async def _respond(self, payload: dict[str, Any], context: Any, answer: Answer) -> None:
        request = to_request(context.id(), payload, self._defaults, self.max_model_len(), self._config.lora_modules)
        responder = Responder(
            self._tokenizer,
            len(request.prompt_token_ids),
            wants_logprobs=request.sampling.logprobs is not None,
            one_by_one=has_stop_strings(payload),
        )
        news: asyncio.Queue[Exception | None] = asyncio.Queue()

        def give(item: GenerateOutput | MigrateError) -> None:
            if isinstance(item, MigrateError):
                news.put_nowait(item)
                return
            try:
                for chunk in responder.chunks(item):
                    answer.put(chunk)
            except Exception as error:
                # Of this request alone: its worker's connection, which has just brought it, is that of others too.
                news.put_nowait(error)
                return
            if item.finish_reason is not None:
                news.put_nowait(None)
            elif item.frozen is not None:
                # Beside the tokens: the first ones of the decode worker need not wait for its end.
                self._spawn(self._hand_over(stream, item.frozen))

        stream = Stream(request, self._config.step_deadline_s, give)
        self.streams[request.request_id] = stream
        watch = asyncio.ensure_future(self._watch_client(stream, context, give))
        try:
            await self._start(stream)
            while (loss := await news.get()) is not None:
                if not isinstance(loss, MigrateError):
                    raise loss
                await self._recover(stream, loss)
        finally:
            watch.cancel()
            self.streams.pop(request.request_id, None)
            await stream.close()
            stream.note(EventKind.ENDED)
            self.ended.append(stream.describe())
            export(self.ended[-1], context)

    def max_model_len(self) -> int:
        """Longest prompt and answer that every worker takes. Raises ``NoRoom`` before any has reported."""
        lengths = [w.state.info.max_model_len for w in self.pool.workers.values() if w.state.info is not None]
        if not lengths:
            raise NoRoom("no worker has reported yet")
        return min(lengths)

    async def _watch_client(self, stream: Stream, context: Any, give: Callable[[GenerateOutput], None]) -> None:
        await context.async_killed_or_stopped()
        await stream.close()
        give(GenerateOutput(len(stream.tokens), finish_reason=FinishReason.CANCELLED))

    async def run(self) -> None:
        """Know the workers, and give up on those that fall silent, until cancelled."""
        await asyncio.gather(self.pool.run(), self._watch_silence())

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(_SILENCE_CHECK_S)
            for stream in self.streams.values():
                self._check_silence(stream)

    def _check_silence(self, stream: Stream) -> None:
        """A stopped process or a cut cable breaks no connection: neither token nor report is what tells.

        An engine in one long step is as silent, but at work.
        """
        leg, now = stream.owner, time.monotonic()
        if leg is None or leg.ended.is_set():
            return
        heard, silence_s, busy_s = max(leg.heard, leg.worker.reported), self._config.silence_s, self._config.busy_s
        if now - leg.worker.busy > silence_s and now - heard > silence_s:
            leg.give_up(f"worker {leg.worker.name} was silent for {silence_s:g} s (Router.silence-s)")
        elif now - heard > max(silence_s, busy_s):
            leg.give_up(f"worker {leg.worker.name} computes, but was silent for {busy_s:g} s (Router.busy-s)")

    async def _start(self, stream: Stream) -> None:
        length = len(stream.request.prompt_token_ids)
        single = stream.request.sampling.why_not_migratable() is not None
        if length > self._config.local_prefill_max_tokens and not single:
            try:
                worker = self.pool.pick("prefill")
                stream.note(EventKind.PREFILL, worker)
                stream.owner = stream.open(worker, freeze_after=1)
                return
            except NoRoom as error:
                self.metrics.prefilled_locally("no_worker")
                logger.warning("request %s is prefilled on a decode worker: %s", stream.request.request_id, error)
        else:
            self.metrics.prefilled_locally("not_migratable" if single else "short")
        worker = self._pick()
        stream.note(EventKind.DECODE, worker)
        stream.owner = stream.open(worker)

    def _pick(self, exclude: tuple[int, ...] = ()) -> Worker:
        """A decode worker; while there is none a prefill worker, whose engine can do the same."""
        try:
            return self.pool.pick("decode", exclude)
        except NoRoom:
            with contextlib.suppress(NoRoom):
                return self.pool.pick("prefill", exclude)
            raise

    async def _hand_over(self, stream: Stream, frozen: Frozen) -> None:
        """Prefill is done: find a decode worker, or let the prefill worker go on when there is none."""
        tried: tuple[int, ...] = ()
        async with stream.lock:
            source = stream.owner
            while source is not None and not stream.finished:
                try:
                    worker = self.pool.pick("decode", tried)
                except NoRoom:
                    with contextlib.suppress(MigrateError):  # Its leg tells the loss of the worker.
                        await source.worker.call(WorkerOp.RESUME, stream.request.request_id)
                    return
                began = time.monotonic()
                try:
                    await hand_over(stream, worker, frozen)
                    self.metrics.handed_off(time.monotonic() - began, True)
                    return
                except MigrateError as error:
                    self.metrics.handed_off(time.monotonic() - began, False)
                    logger.warning("hand-off of %s to %s: %s", stream.request.request_id, worker.name, error)
                    tried += (worker.instance,)

    async def _recover(self, stream: Stream, error: MigrateError) -> None:
        """The owner is lost: replay elsewhere, or give the error to the client."""
        if isinstance(error, InvalidRequest) or stream.replays >= self._config.replay_limit:
            raise error
        if stream.owner is not None:
            stream.shunned.add(stream.owner.worker.instance)
        logger.warning("request %s is replayed: %s", stream.request.request_id, error)
        self.metrics.replayed(error.code)
        for attempt in range(20):
            try:
                worker = self._pick(tuple(stream.shunned))
            except NoRoom:
                if attempt == 19:
                    raise
                await asyncio.sleep(0.5)
                if attempt >= _SHUN_ROUNDS:
                    stream.shunned.clear()
                continue
            lost = stream.replace_owner(worker)
            if lost is not None and not lost.task.done():
                self._spawn(stream.abandon(lost))
            return

    def _worker_drains(self, worker: Worker) -> None:
        self._spawn(self.mover.drain(worker, 300.0))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s", task.exception())

    async def control(self, payload: Any) -> AsyncIterator[dict[str, str]]:
        """Endpoint for ``dynamo migrate``, ``drain`` and ``status``, and for the planner."""
        try:
            yield pack(await self._answer(unpack(payload, RouterCall)))
        except MigrateError as error:
            yield pack(RouterReply(error=(error.code, str(error))))

    async def _answer(self, call: RouterCall) -> RouterReply:
        match call.op:
            case RouterOp.STATUS:
                return RouterReply(
                    workers=tuple(w.describe() for w in self.pool.workers.values()),
                    streams=tuple(s.describe() for s in self.streams.values()),
                    moves=tuple(self.mover.moves),
                    ended=tuple(self.ended),
                    decisions=(*self._decisions, *self._left_alone),
                    metrics=tuple(filter(None, (address(),))),
                )
            case RouterOp.MIGRATE:
                stream = self.streams.get(call.request_id)
                if stream is None:
                    known = ", ".join(list(self.streams)[:5]) or "none"
                    raise RequestNotFound(f"no request {call.request_id!r} is running; running: {known}")
                target = self.pool.find(call.worker)
                return RouterReply(moves=(await self.mover.move(stream, target, call.mode, call.source),))
            case RouterOp.DRAIN:
                return RouterReply(moves=tuple(await self.mover.drain(self.pool.find(call.worker), call.timeout_s)))
            case RouterOp.UNDRAIN:
                self.pool.find(call.worker).held_back = False
                return RouterReply()
            case RouterOp.REPORT:
                self._decisions.extend(d for d in call.decisions if d.verdict is not Verdict.LEAVE)
                self._left_alone = tuple(d for d in call.decisions if d.verdict is Verdict.LEAVE)
                return RouterReply()
        raise InvalidRequest(f"unknown call {call.op}")
