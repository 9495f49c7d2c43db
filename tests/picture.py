# SPDX-License-Identifier: Apache-2.0
"""Draws when tokens of eight clients come while one of two workers is drained: ``python -m tests.picture FILE.svg``.

The workers are real migration code with engines without a model, in one process and in real time; Dynamo's frontend
is a double. So the picture shows how a drain goes, and is no measurement.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from components.engine.protocol import GenerateRequest, RequestId, Sampling
from tests.streams import Cluster, Node

STEP_S = 0.02
BEFORE_S, TOKENS = 0.9, 100
PROMPT = tuple(range(40, 104))
COLOURS = ("#0072b2", "#d55e00")
LEFT, TOP, ROW, PER_S = 96, 34, 20, 260.0


class Client:
    """One stream: (seconds, number of the worker that made the token)."""

    def __init__(self, number: int, cluster: Cluster) -> None:
        self.home = number % 2
        self.seen: list[tuple[float, int]] = []
        self._id = RequestId(f"client-{number}")
        self._cluster = cluster

    async def run(self, begin: float) -> None:
        """Read it to its end."""
        node: Node = self._cluster.nodes[self.home]
        request = GenerateRequest(self._id, (*PROMPT, len(self._id)), Sampling(temperature=0.0, max_tokens=TOKENS))
        async with aclosing(node.handle(request)) as stream:
            async for output in stream:
                leg = node.requests.legs.get(self._id)
                made = 1 - self.home if leg is not None and leg.away is not None else self.home
                now = asyncio.get_running_loop().time() - begin
                self.seen += [(now, made)] * len(output.token_ids)


async def record() -> tuple[list[Client], float, int]:
    """The clients, when the drain began, and how many requests it moved."""
    cluster = Cluster("picture", 0)
    await cluster.start(2, num_blocks=800, max_model_len=400, max_num_seqs=8, step_s=STEP_S, vocab_size=1000)
    begin = asyncio.get_running_loop().time()
    clients = [Client(number, cluster) for number in range(8)]
    reading = [asyncio.ensure_future(client.run(begin)) for client in clients]
    await asyncio.sleep(BEFORE_S)
    drained = asyncio.get_running_loop().time() - begin
    moves = await cluster.nodes[0].status.drain(10.0)
    await asyncio.gather(*reading)
    await cluster.stop()
    return clients, drained, sum(move.ok for move in moves)


def draw(clients: list[Client], drained: float, moved: int) -> str:
    """The picture as SVG; it needs no script and reads on light and dark pages."""
    ordered = sorted(clients, key=lambda client: client.home)
    end = max(client.seen[-1][0] for client in clients)
    width, bottom = LEFT + end * PER_S + 24, TOP + len(clients) * ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom + 44}" font-family="sans-serif" '
        f'font-size="11" fill="#808080"><title>{moved} of 8 streams move from worker A to worker B</title>',
    ]
    for row, client in enumerate(ordered):
        y = TOP + row * ROW
        lines.append(f'<text x="8" y="{y + 11}">client {row + 1}</text>')
        for worker, colour in enumerate(COLOURS):
            ticks = "".join(f"M{LEFT + at * PER_S:.1f} {y}v14" for at, made in client.seen if made == worker)
            lines += [f'<path d="{ticks}" stroke="{colour}" stroke-width="2"/>'] if ticks else []
    at = LEFT + drained * PER_S
    lines.append(f'<path d="M{at:.1f} {TOP - 8}V{bottom}" stroke="#808080" stroke-dasharray="3"/>')
    lines.append(f'<text x="{at + 4:.1f}" y="{TOP - 12}">worker A is drained</text>')
    for second in range(int(end) + 1):
        lines.append(f'<text x="{LEFT + second * PER_S:.0f}" y="{bottom + 16}">{second} s</text>')
    for worker, colour in enumerate(COLOURS):
        x = LEFT + 260 * worker
        lines.append(f'<rect x="{x}" y="{bottom + 26}" width="14" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{x + 20}" y="{bottom + 35}">a token made by worker {"AB"[worker]}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/drain.svg")
    target.write_text(draw(*asyncio.run(record())))
    print(f"{target} is written")
