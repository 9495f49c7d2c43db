# SPDX-License-Identifier: Apache-2.0
"""One simulated worker: all running requests advance in lock-step, one token each per forward step.

Between two changes of the batch only the KV grows, so that many steps are skipped in closed form: the state is a step
counter, and a request's tokens follow from the step at which it joined. ``advance`` brings the worker to the last step
boundary before a time; changes happen only at boundaries. ``next_event`` is the time of the next internal event: a
request ends, a prefill completes, KV runs out, or a waiting request may be admitted.

As in vLLM: first come, first served; prompts are computed in chunks beside decoding, several short ones in one step;
when KV runs out the youngest request is preempted and recomputed later; prompts stay cached in what is free.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from heapq import heappop, heappush

from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.traces import Arrival

NOT_YET = math.inf


class Request:
    """One request over its whole life."""

    __slots__ = (
        "arrival", "came_from", "done_s", "ended", "epoch", "first_s", "generated", "joined", "key", "last_move_s",
        "moved", "moving", "stall_s", "stalled_since", "target", "worker",
    )  # fmt: skip

    def __init__(self, key: int, arrival: Arrival) -> None:
        self.key = key
        self.arrival = arrival
        self.worker: Worker | None = None
        self.generated = 0
        """Tokens before it joined its present batch."""
        self.joined = 0
        """Step at which it joined."""
        self.epoch = 0
        """Changes each time it leaves a batch, which invalidates older heap entries."""
        self.first_s = NOT_YET
        self.done_s = NOT_YET
        self.stalled_since = NOT_YET
        self.stall_s = 0.0
        self.moved = 0
        self.moving = False
        self.ended = False
        """Its worker has ended while it ran."""
        self.target: Worker | None = None
        self.came_from: Worker | None = None
        self.last_move_s = -math.inf

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.done_s - self.first_s) / max(1, self.arrival.output_tokens - 1)

    @property
    def need(self) -> int:
        """KV tokens to continue outside a batch."""
        return self.arrival.prompt_tokens + self.generated


class Worker:
    """See the module docstring."""

    def __init__(
        self, key: int, model: WorkerModel, time_s: float = 0.0, holders: defaultdict[int, set[int]] | None = None
    ) -> None:
        self.key = key
        self.name = f"w{key}"
        self.model = model
        self.time_s = time_s
        self.steps = 0
        self.kv = 0
        """Tokens of the running batch."""
        self.reserved = 0
        """Reserved tokens: prompts in prefill, and landing requests."""
        self.running: dict[Request, None] = {}
        self.waiting: deque[Request] = deque()
        self.prefill: list[Request] = []
        """Prompts of one step, or a long one of several."""
        self.prefill_end = 0
        self.prefill_tokens = 0
        self.moves = 0
        self.leaving = False
        self.ends = False
        """It is gone as soon as it is empty."""
        self.ending_s = NOT_YET
        self.born_s = time_s
        self.gone_s = NOT_YET
        self.version = 0
        self.done: list[Request] = []
        self.computed: list[Request] = []
        """Their prompts are; the cluster takes both lists."""
        self.preemptions = 0
        self._seen_at = (0, time_s)
        self._mean_step_s = 0.0
        self._ends: list[tuple[int, int, int, Request]] = []
        self._prefixes: OrderedDict[int, None] = OrderedDict()
        self._holders = defaultdict(set) if holders is None else holders
        """Workers that hold each block, as KV events tell a router; all workers share it."""
        self._uses: Counter[int] = Counter()
        """Requests here that use each prefix block."""
        self.shared = 0
        """Tokens that several requests have together, beyond the first."""

    # Time

    def step_s(self) -> float:
        """Duration of the next step."""
        step = self.model.step
        seconds = step.base_s + step.per_seq_s * len(self.running) + step.per_kv_token_s * self.kv
        if self.prefill:
            chunk = min(self.model.chunk_tokens, self.prefill_tokens)
            seconds += max(step.prompt_s, step.per_prefill_token_s * chunk)
        return seconds * self._slower()

    def boundary(self) -> float:
        """End of the step under way; now when there is none."""
        return self.time_s + (self.step_s() if self.running or self.prefill else 0.0)

    def _slower(self) -> float:
        return 1.0 + self.model.interference * min(self.moves, self.model.freezes)

    def mean_step_s(self) -> float:
        """Mean duration of the steps since the last call; 0 when idle."""
        steps, time_s = self._seen_at
        if self.steps > steps:
            self._seen_at = (self.steps, self.time_s)
            self._mean_step_s = (self.time_s - time_s) / (self.steps - steps)
        return self._mean_step_s if self.running else 0.0

    def _growth_s(self) -> float:
        """Increase of the step time from step to step."""
        return self.model.step.per_kv_token_s * len(self.running) * self._slower()

    def _steps_take_s(self, count: int) -> float:
        return count * self.step_s() + self._growth_s() * count * (count - 1) / 2

    def _skip(self, count: int) -> None:
        self.time_s += self._steps_take_s(count)
        self.steps += count
        self.kv += count * len(self.running)

    def advance(self, time_s: float) -> None:
        """Complete all steps that end by ``time_s``, up to the next event."""
        if not self.running and not self.prefill:
            self.time_s = max(self.time_s, time_s)
            return
        left = time_s - self.time_s + 1e-9  # What rounding takes from a step that ends now.
        first, growth = self.step_s(), self._growth_s()
        if left < first:
            return
        if growth > 0:
            slope = first - growth / 2
            count = int((-slope + math.sqrt(slope * slope + 2 * growth * left)) / growth)
        else:
            count = int(left / first)
        limit = self._next_step()
        if limit is not None:
            count = min(count, limit - self.steps)
        self._skip(max(0, count))

    def _next_step(self) -> int | None:
        """Step boundary of the next event, or None when nothing happens by itself."""
        found = []
        while self._ends and self._ends[0][2] != self._ends[0][3].epoch:
            heappop(self._ends)
        if self._ends:
            found.append(self._ends[0][0])
        if self.prefill:
            found.append(self.prefill_end)
        if self.running:
            room = self.model.capacity_tokens - self.held
            found.append(self.steps + max(0, room // len(self.running)) + 1)
        if self._can_admit():
            found.append(self.steps + 1)
        return min(found) if found else None

    def next_event(self) -> float | None:
        """Time of the next event."""
        step = self._next_step()
        return None if step is None else self.time_s + self._steps_take_s(max(0, step - self.steps))

    def run_to_event(self) -> None:
        """Advance to the next event and process it."""
        step = self._next_step()
        if step is not None:
            self._skip(max(0, step - self.steps))
        self.settle()

    # Changes at a step boundary

    def settle(self) -> None:
        """Process everything due at this boundary: ends, prefill, lack of KV, admission."""
        self.version += 1
        if self.prefill and self.prefill_end <= self.steps:
            computed, self.prefill = self.prefill, []
            for request in computed:
                self.reserved -= request.need
                request.generated = max(1, request.generated)
                self.join(request)
            self.computed += computed
        while self._ends and self._ends[0][0] <= self.steps:
            _, _, epoch, request = heappop(self._ends)
            if epoch == request.epoch:
                self._leave(request)
                request.done_s = self.time_s
                self.done.append(request)
        while self.held > self.model.capacity_tokens and (self.running or self.prefill):
            self._preempt()
        self._admit()

    def join(self, request: Request) -> None:
        """Continue a request with complete KV."""
        request.worker = self
        if request.first_s == NOT_YET:
            request.first_s = self.time_s
        if request.stalled_since != NOT_YET:
            request.stall_s += self.time_s - request.stalled_since
            request.stalled_since = NOT_YET
        request.joined = self.steps
        request.epoch += 1
        self.running[request] = None
        self.kv += request.need
        end = self.steps + max(0, request.arrival.output_tokens - request.generated)
        heappush(self._ends, (end, request.key, request.epoch, request))

    def _leave(self, request: Request) -> None:
        request.generated = self.generated(request)
        del self.running[request]
        request.epoch += 1
        self.kv -= request.need
        self._unuse(request)

    def generated(self, request: Request) -> int:
        """Output tokens so far, in any phase."""
        if request in self.running:
            return request.generated + self.steps - request.joined
        return request.generated

    def _preempt(self) -> None:
        if self.prefill:
            request = self.prefill.pop()
            self.reserved -= request.need
            self._unuse(request)
        else:
            request = next(reversed(self.running))
            self._leave(request)
        self.preemptions += 1
        if request.first_s != NOT_YET:
            request.stalled_since = self.time_s
        self.waiting.appendleft(request)

    def _can_admit(self) -> bool:
        return not self.prefill and self._fits()

    def _fits(self) -> bool:
        if not self.waiting:
            return False
        limit = (1.0 - self.model.watermark) * self.model.capacity_tokens
        new = self.waiting[0].need - self._known(self.waiting[0])
        fits = self.held + new <= limit or not (self.running or self.reserved)
        return fits and len(self.running) + len(self.prefill) < self.model.max_seqs

    def _known(self, request: Request) -> int:
        """Its tokens that others have in use here."""
        return self.model.prefix_block_tokens * sum(block in self._uses for block in request.arrival.prefix)

    def _admit(self) -> None:
        """Begin prompts that fit one step together, or one that takes several."""
        if self.prefill:
            return
        self.prefill_tokens = 0
        while self._fits():
            request = self.waiting[0]
            tokens = self.to_compute(request)
            if self.prefill and self.prefill_tokens + tokens > self.model.chunk_tokens:
                break
            self.waiting.popleft()
            self.prefill.append(request)
            self.prefill_tokens += tokens
            self.reserved += request.need
            self._use(request)
            self.remember(request.arrival)
        self.prefill_end = self.steps + math.ceil(self.prefill_tokens / self.model.chunk_tokens)

    def to_compute(self, request: Request) -> int:
        """Tokens of a prompt that are not cached here, at least one."""
        cached = self.overlap(request.arrival) * self.model.prefix_block_tokens
        return max(1, request.need - min(cached, request.need - 1))

    def enqueue(self, request: Request) -> None:
        """Add a new request, or one that moves without KV."""
        request.worker = self
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Remove a request that has moved, with or without KV."""
        if request in self.running:
            self._leave(request)
        else:
            self.waiting.remove(request)

    def drop(self) -> list[Request]:
        """All requests, which lose their KV here. Moves under way fail."""
        found = [*self.running, *self.prefill, *self.waiting]
        for request in list(self.running):
            self._leave(request)
        for request in self.prefill:
            self.reserved -= request.need
            self._unuse(request)
        self.prefill.clear()
        self.waiting.clear()
        return found

    # Prefix cache

    def _use(self, request: Request) -> None:
        for block in request.arrival.prefix:
            self.shared += self.model.prefix_block_tokens * (self._uses[block] > 0)
            self._uses[block] += 1

    def _unuse(self, request: Request) -> None:
        for block in request.arrival.prefix:
            self._uses[block] -= 1
            if self._uses[block]:
                self.shared -= self.model.prefix_block_tokens
            else:
                del self._uses[block]

    def overlap(self, arrival: Arrival) -> int:
        """Cached leading prefix blocks."""
        count = 0
        for block in arrival.prefix:
            if block not in self._prefixes:
                break
            count += 1
        return count

    def remember(self, arrival: Arrival) -> None:
        """Its prompt is cached here from now on, in place of what was used longest ago."""
        for block in arrival.prefix:
            if block not in self._prefixes:
                self._holders[block].add(self.key)
            self._prefixes[block] = None
            self._prefixes.move_to_end(block)
        free = (self.model.capacity_tokens - self.held) // self.model.prefix_block_tokens
        while len(self._prefixes) > max(0, free) + len(self._uses):
            block, _ = self._prefixes.popitem(last=False)
            self._holders[block].discard(self.key)

    @property
    def cached(self) -> Iterable[int]:
        """All prefix blocks here."""
        return self._prefixes

    def land(self, request: Request) -> None:
        """Continue a request that has moved here with its KV."""
        self._use(request)
        self.remember(request.arrival)
        self.join(request)

    # For dispatch and snapshots

    @property
    def held(self) -> int:
        """KV tokens in use."""
        return self.kv + self.reserved - self.shared

    def queued_tokens(self) -> int:
        """KV that waiting requests will need."""
        return sum(request.need for request in self.waiting)

    @property
    def empty(self) -> bool:
        """True without requests, also incoming ones."""
        return not (self.running or self.waiting or self.prefill or self.reserved or self.moves)
