# SPDX-License-Identifier: Apache-2.0
"""Cost of asking all workers: ``python -m benchmarks.status``. Workers are in this process, messages are real.

For each size: processor time and bytes of the first complete state, of one second's differences, and of an unchanged
state; and the cost of one answer at the worker. Without a network: times exclude the wire and Dynamo's request plane.
"""

from __future__ import annotations

import asyncio
import time

from components.client import Workers
from tests import fake_workers
from tests.fake_workers import info_of

SIZES = ((64, 256), (250, 256), (1000, 256))


async def measure(workers: int, requests: int) -> None:
    """One size."""
    cluster = fake_workers.Workers(workers)
    for instance, engine in cluster.engines.items():
        engine.table = [info_of(f"0b1a52ac-5a11-4a5e-9f0c-{instance:06x}{i:06x}", i) for i in range(requests)]
    client = Workers(cluster)
    for what in ("everything", "a second on", "nothing new"):
        if what == "a second on":
            await asyncio.sleep(1.0)
            cluster.go_on(40)
        cluster.bytes, reports = 0, sum(e.reports for e in cluster.engines.values())
        cpu = time.process_time()
        await client.refresh(600.0)
        asked = 1e3 * (time.process_time() - cpu)
        cpu = time.process_time()
        status = client.status(ages=False)
        assembled = 1e3 * (time.process_time() - cpu)
        print(
            f"{workers:5d} workers x {requests} requests, {what:11s}: {cluster.bytes / 1e6:6.2f} MB, "
            f"{asked:7.1f} ms for both sides ({asked / workers:4.2f} ms for each worker), "
            f"{assembled:5.1f} ms to assemble, engines asked "
            f"{sum(e.reports for e in cluster.engines.values()) - reports} times, "
            f"{sum(bool(w.missing) for w in status.workers)} missing"
        )


async def main() -> None:
    """All sizes."""
    for workers, requests in SIZES:
        await measure(workers, requests)


if __name__ == "__main__":
    asyncio.run(main())
