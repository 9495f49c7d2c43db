# SPDX-License-Identifier: Apache-2.0
"""Models with several groups of KV blocks: two real vLLM schedulers and a memory that checks every slot.

A step checks everything that its tokens read: KV of another request, another position or no request is detected at
once, also from the prefix cache long after the move.
"""

from __future__ import annotations

import contextlib
import random
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

from components.engine.groups import Table, fields_of, tables_of, whole_blocks
from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.vllm.control import Marker, Op
from components.engine.vllm.ranks import Snapshot
from components.engine.vllm.records import Job, JobResult, StepResults
from components.errors import NoRoom, RequestNotFound
from tests.vllm_scheduler import BLOCK, PEER, FakeExecutor, Played

pytest.importorskip("vllm")
WINDOWS = (40, None)
GEMMA = (24, 24, None, 24)
STATES = (None, "align", "align")


def end(engine: Engine, request: Any) -> None:
    from vllm.v1.request import RequestStatus

    engine.played.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)


class Summing(FakeExecutor):
    """Workers that know their memory."""

    def __init__(self, memory: dict[int, list[Any]]) -> None:
        super().__init__()
        self.memory = memory

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "dm_snapshots":
            return [[Snapshot(b"", [summed(self.memory, block) for block in blocks]) for _, blocks in args[0]]]
        return super().collective_rpc(method, args)


def summed(memory: dict[int, list[Any]], block: int) -> int:
    return hash(tuple(memory.get(block, ())))


class Engine:
    """A scheduler, and what its steps would do to the memory."""

    def __init__(self, model: str, windows: tuple[int | str | None, ...], chance: random.Random, **more: Any) -> None:
        self.played = Played(model, windows=windows, **more)
        self.memory: dict[int, list[Any]] = {}
        self.played.executor = Summing(self.memory)
        self.played.call(Op.INFO)
        self.windows, self.chance = windows, chance
        self.source: Engine | None = None
        self._under_way: list[tuple[Any, list[tuple[Any, int, int, list[list[int]]]]]] = []
        self._copies: dict[int, tuple[Job, list[tuple[int, int, int]]]] = {}
        self.played.executor.copied = self._copy_now

    def step(self) -> None:
        """Begin one; end the oldest when there are two, or by chance."""
        scheduler = self.played.scheduler
        output = self.played.schedule()
        ran = []
        for vllm_id, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[vllm_id]
            tables = scheduler.migration.port.tables(request)
            ran.append((request, request.num_computed_tokens - count, count, tables))
        for job in self.played.jobs(output):
            self._begin(job)
        self._under_way.append((output, ran))
        if len(self._under_way) > 1 or self.played.scheduler.__class__.__name__ == "MigrationScheduler":
            self.end_step()

    def end_step(self) -> None:
        if not self._under_way:
            return
        output, ran = self._under_way.pop(0)
        # Requests of one step share blocks that it fills: a layer writes for all before it looks at any.
        for write in (True, False):
            for request, start, count, tables in ran:
                self._run(request, start, count, tables, write)
        self.move_bytes()
        self.played.token = self.chance.randrange(100)
        done = [self._result(i) for i in [i for i, (_, left) in self._copies.items() if not left]]
        self.played.finish_step(output, StepResults(done))
        self.played.check()

    def _run(self, request: Any, start: int, count: int, tables: list[list[int]], write: bool) -> None:
        tokens = list(request.all_token_ids)[: start + count]
        marks = [hash(tuple(tokens[: i + 1])) for i in range(len(tokens))]
        for group, (window, table) in enumerate(zip(self.windows, tables, strict=True)):
            if isinstance(window, str):
                if write:
                    self._run_state(group, BLOCK if window == "align" else 512, start, count, table, marks)
                continue
            for position in () if write else range(max(0, start - window + 1) if window else 0, start):
                block = table[position // BLOCK]
                assert block, f"{request.request_id}: position {position} of group {group} has no block"
                found = self.memory.get(block, [None] * BLOCK)[position % BLOCK]
                assert found == (group, marks[position]), f"{request.request_id}: {position} of group {group}"
            for position in range(start, min(start + count, len(marks))) if write else ():
                slots = self.memory.setdefault(table[position // BLOCK], [None] * BLOCK)
                slots[position % BLOCK] = (group, marks[position])

    def _run_state(self, group: int, size: int, start: int, count: int, table: list[int], marks: list[int]) -> None:
        """A state is read where the last step left it, and written where this one ends."""
        if start:
            block = table[(start - 1) // size]
            assert block and self.memory.get(block) == [(group, marks[start - 1])] * BLOCK, f"state behind {start}"
        block = table[(start + count - 1) // size]
        assert block
        self.memory[block] = [(group, marks[min(start + count, len(marks)) - 1])] * BLOCK

    # Copies

    def _begin(self, job: Job) -> None:
        assert len(job.remote_blocks) == len(job.local_blocks) and len(set(job.local_blocks)) == len(job.local_blocks)
        assert 0 not in job.remote_blocks and 0 not in job.local_blocks
        halves = [(s, d, half) for s, d in zip(job.remote_blocks, job.local_blocks, strict=True) for half in (0, 1)]
        self._copies[job.job_id] = (job, halves)

    def _copy_now(self, job: Job, _: float) -> JobResult | None:
        self._begin(job)
        if self.chance.random() < 0.4:
            return None
        self.move_bytes(job.job_id)
        return self._result(job.job_id)

    def move_bytes(self, job_id: int | None = None) -> None:
        """Some of what is under way, or all of a job."""
        source = self.source
        for number, (job, left) in self._copies.items():
            count = len(left) if number == job_id else self.chance.randrange(len(left) + 1)
            for src, dst, half in left[:count]:
                assert source is not None and job.job_id == number
                there = source.memory.get(src) or [None] * BLOCK
                part = slice(0, BLOCK // 2) if half == 0 else slice(BLOCK // 2, BLOCK)
                self.memory.setdefault(dst, [None] * BLOCK)[part] = there[part]
            del left[:count]

    def _result(self, job_id: int) -> JobResult:
        job, _ = self._copies.pop(job_id)
        wrong = [block for block, sums in job.checks if summed(self.memory, block) != sums[0]]
        if wrong:
            return JobResult(job_id, ok=False, error=("integrity", "wrong"), bad_blocks=(*wrong, *job.vouched))
        if self.chance.random() < 0.1:
            bad = tuple(self.chance.sample(job.local_blocks, len(job.local_blocks) // 2))
            return JobResult(job_id, ok=False, error=("lost", "lost"), bad_blocks=bad)
        return JobResult(job_id, ok=True)


class Move:
    """One request on its way, driven as a migration session does it."""

    def __init__(self, a: Engine, b: Engine, request: Any) -> None:
        self.a, self.b, self.request = a, b, request
        self.landing: Any = None
        self.frozen: Frozen | None = None
        self._answer: Any = None
        self.over = False

    def _offer(self) -> KVOffer:
        offer = self.a.played.call(Op.OFFER, self.request).offer  # type: ignore[union-attr]
        assert offer is not None
        return msgspec.structs.replace(whole_blocks(offer, self.request.num_tokens - 1), room_tokens=120)

    def advance(self, chance: random.Random) -> None:
        try:
            self._advance(chance)
        except NoRoom:
            self._give_up()
        except RequestNotFound:
            # It ended on its own.
            if self.landing is not None:
                end(self.b, self.landing)
            self.over = True

    def _advance(self, chance: random.Random) -> None:
        request, b = self.request, self.b.played
        if self.landing is None:
            prompt = request.num_prompt_tokens
            marker = Marker(RequestId(f"m{request.request_id}"), prompt, landing=self._offer())
            self.landing = b.add(list(request.all_token_ids), marker, f"m{request.request_id}")
            return
        if self._answer is None:
            status = b.call(Op.LANDING, self.landing).landing  # type: ignore[union-attr]
            if status.landed and chance.random() < 0.5:
                b.call(Op.EXTEND, self.landing, offer=self._offer(), tokens=tuple(request.output_token_ids))
            elif chance.random() < 0.4:
                self._answer = self.a.played.call(Op.FREEZE, request)
            return
        if isinstance(self._answer, Future):
            if not self._answer.done():
                return
            self._answer = self._answer.result()
        if self.frozen is None:
            self.frozen = self._answer.frozen
            b.call(Op.COMMIT, self.landing, frozen=self.frozen)
        record = b.scheduler.migration.find(self.landing.request_id)
        # A source may not keep its word: others get the blocks while they are copied.
        if record is None or record.incoming is None or chance.random() < 0.1:
            end(self.a, request)
            self.over = True

    def _give_up(self) -> None:
        end(self.b, self.landing)
        with contextlib.suppress(RequestNotFound):
            self.a.played.call(Op.RESUME, self.request)
        self.over = True


def prompts(chance: random.Random) -> list[int]:
    """Many begin alike."""
    shared = [9] * chance.choice([0, 20, 50, 90])
    return [*shared, *(chance.randrange(3) for _ in range(chance.choice([5, 30, 60])))]


@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no prefix cache"])
@pytest.mark.parametrize(
    "windows", [WINDOWS, GEMMA, (24,), STATES], ids=["two groups", "four groups", "only a window", "states"]
)
@pytest.mark.parametrize("cls", ["MigrationScheduler", "AsyncMigrationScheduler"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 12))])
def test_no_token_looks_at_kv_of_another_request_or_position(
    tiny_llama: str, cls: str, windows: tuple[int | str | None, ...], caching: bool, seed: int
) -> None:
    chance = random.Random(f"{cls} {windows} {caching} {seed}")
    if "align" in windows and not caching:
        windows = tuple("none" if window == "align" else window for window in windows)
    more: dict[str, Any] = {
        "cls": cls,
        "max_num_batched_tokens": 256 + len(windows),
        "max_num_seqs": 8,
        "enable_prefix_caching": caching,
    }
    size = 12 * len(windows) * chance.choice([3, 5]) + 8
    a, b = (Engine(tiny_llama, windows, chance, blocks=size, **more) for _ in "ab")
    b.source = a
    moves: list[Move] = []
    moved = 0
    for _ in range(250):
        for engine in (a, b):
            if len(engine.played.scheduler.requests) < 5 and chance.random() < 0.4:
                engine.played.add(prompts(chance), max_tokens=chance.choice([3, 30, 60]))
            if chance.random() < 0.9:
                engine.step()
            b.move_bytes()
        running = [r for r in a.played.scheduler.running if all(m.request is not r for m in moves)]
        if running and len(moves) < 3 and chance.random() < 0.4:
            moves.append(Move(a, b, chance.choice(running)))
        for move in moves:
            move.advance(chance)
            if move.over:
                moved += move.frozen is not None
        moves = [move for move in moves if not move.over]
        a.played.check()
        b.played.check()
    assert moved > 2
    for engine in (a, b):
        for request in list(engine.played.scheduler.requests.values()):
            end(engine, request)
        for _ in range(20):
            engine.step()
        while engine._under_way:
            engine.end_step()
        engine.played.check()
        assert engine.played.free == engine.played.scheduler.migration.port.num_blocks - 1


def test_a_window_travels_without_what_it_has_left(tiny_llama: str) -> None:
    a = Engine(tiny_llama, WINDOWS, random.Random(0), blocks=64)
    request = a.played.add(list(range(100)), max_tokens=50)
    for _ in range(3):
        a.step()
    offer = a.played.call(Op.FREEZE, request).frozen.offer  # type: ignore[union-attr]
    window, full = tables_of(offer)
    assert offer.num_tokens == 102
    assert (full.first, len(full.ids)) == (0, 7)
    # Tokens 63 to 102 are looked at by the next one.
    assert (window.first, len(window.ids)) == (3, 4)


def test_no_copy_goes_where_a_window_has_been(tiny_llama: str) -> None:
    """Those blocks may be given to others at any call; a source should not offer them, and one does."""
    played = Played(tiny_llama, windows=WINDOWS)

    def offer(tokens: int) -> KVOffer:
        blocks = -(-tokens // BLOCK)
        tables = [Table(BLOCK, 0, tuple(range(first, first + blocks))) for first in (100, 200)]
        return KVOffer(RequestId("moved"), (PEER,), BLOCK, num_tokens=tokens, generation=0, **fields_of(tables))

    request = played.land("moved", 40, offer=offer(32))
    (job,) = played.jobs(played.step())
    assert job.remote_blocks == (100, 101, 200, 201)
    played.step(played.done(job))
    played.call(Op.EXTEND, request, offer=offer(112), tokens=(40, *range(41, 120)))
    (job,) = played.jobs(played.step())
    assert job.remote_blocks == (104, 105, 106, 202, 203, 204, 205, 206)
    played.step(played.done(job))
    played.check()


def test_a_group_whose_blocks_lie_elsewhere_now_is_copied_again(tiny_llama: str) -> None:
    played = Played(tiny_llama, windows=WINDOWS)

    def offer(*tables: tuple[int, ...]) -> KVOffer:
        fields = fields_of([Table(BLOCK, 0, ids) for ids in tables])
        return KVOffer(RequestId("moved"), (PEER,), BLOCK, num_tokens=BLOCK * len(tables[0]), generation=0, **fields)

    request = played.land("moved", 70, offer=offer((100, 101, 102, 103), (200, 201, 202, 203)))
    (job,) = played.jobs(played.step())
    assert job.remote_blocks == (101, 102, 103, 200, 201, 202, 203)
    played.step(played.done(job))
    newer = offer((100, 101, 102, 103, 104, 105), (200, 299, 202, 203, 204, 205))
    played.call(Op.EXTEND, request, offer=newer, tokens=(70, *range(71, 100)))
    (job,) = played.jobs(played.step())
    assert job.remote_blocks == (104, 105, 200, 299, 202, 203, 204, 205)


def test_a_copy_without_what_the_window_needs_is_computed_here(tiny_llama: str) -> None:
    played = Played(tiny_llama, windows=WINDOWS)
    tables = [Table(BLOCK, 5, (105, 106)), Table(BLOCK, 0, tuple(range(200, 207)))]
    offer = KVOffer(RequestId("moved"), (PEER,), BLOCK, num_tokens=110, generation=0, **fields_of(tables))
    request = played.land("moved", 111, offer=offer)
    played.step(played.done(*played.jobs(played.step())))
    played.call(Op.COMMIT, request, frozen=Frozen(offer, tuple(request.output_token_ids)))
    assert played.step().num_scheduled_tokens == {request.request_id: 111}


def test_a_model_with_one_group_says_nothing_of_groups(tiny_llama: str) -> None:
    a = Engine(tiny_llama, (None,), random.Random(0))
    request = a.played.add(list(range(100)), max_tokens=50)
    a.step()
    frozen = a.played.call(Op.FREEZE, request).frozen  # type: ignore[union-attr]
    assert frozen.offer.groups == () and frozen.checked == (2,)
    assert b"groups" not in msgspec.json.encode(frozen)
