# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark's arrivals and figures: equal load for all systems, all losses counted."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from safetensors.numpy import save_file

from benchmarks.graph import machine
from benchmarks.migration.drain import Stream
from benchmarks.serving import chat_report, crowd_report, handoff
from benchmarks.serving.chat import Chats, Turn
from benchmarks.serving.crowd import Crowd, CrowdRun, Load
from benchmarks.serving.handoff import Answer, Measured
from benchmarks.serving.metrics import Event, Run, Sample, Slo, figures
from benchmarks.serving.parts import Kind, parts_of
from benchmarks.serving.profile import self_time
from benchmarks.serving.report import Report, merge, write_report
from benchmarks.serving.streams import Client, Order, Seen
from benchmarks.serving.workloads import CHUNK, Scale, Workload, arrivals, write
from benchmarks.soak.memory import Life
from components.errors import MigrateError
from components.transfer import Transport

SCALE = Scale(rate=4.0, duration_s=10.0)


def sample(ttft: float = 0.1, gaps: int = 9, tokens: int = 10, gap: float = 0.01, error: str = "") -> Sample:
    return Sample(0.0, ttft, (gap,) * gaps, tokens, 10, 8, error)


@pytest.mark.parametrize("workload", list(Workload))
def test_arrivals_are_the_same_each_time_and_in_order(workload: Workload) -> None:
    requests = arrivals(workload, SCALE)
    assert requests == arrivals(workload, SCALE)
    assert [r.time_s for r in requests] == sorted(r.time_s for r in requests)
    assert all(4 <= r.prompt_tokens + r.output_tokens <= 4096 for r in requests)


def test_workloads_differ_in_what_they_are_named_after() -> None:
    steady, bursty = arrivals(Workload.STEADY, SCALE), arrivals(Workload.BURSTY, SCALE)
    assert len({r.time_s for r in bursty}) * 6 == pytest.approx(len({r.time_s for r in steady}), abs=6)
    longest = max(r.output_tokens for r in steady)
    assert max(r.output_tokens for r in arrivals(Workload.SKEWED, SCALE)) > 4 * longest
    assert max(r.prompt_tokens for r in arrivals(Workload.MIXED, SCALE)) > max(r.prompt_tokens for r in steady)


def test_lengths_come_from_a_trace_file(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,64,20\n2023-11-16 18:15:47.1,30,7\n"
    )
    scale = Scale(rate=2.0, duration_s=4.0, trace=str(trace))
    assert {(r.prompt_tokens, r.output_tokens) for r in arrivals(Workload.STEADY, scale)} == {(64, 20), (30, 7)}


def test_prompts_of_a_trace_file_share_no_prefix(tmp_path: Path) -> None:
    requests = arrivals(Workload.STEADY, SCALE)
    write(requests, tmp_path / "a.jsonl", first_id=0)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    ids = [number for row in rows for number in row["hash_ids"]]
    assert len(set(ids)) == len(ids)
    assert [row["input_length"] for row in rows] == [r.prompt_tokens for r in requests]
    assert all(len(row["hash_ids"]) * CHUNK >= row["input_length"] for row in rows)


def test_a_stream_that_breaks_in_the_middle_has_failed() -> None:
    run = Run("migrate", "steady", 0, [sample(), sample(tokens=6, gaps=5), sample(error="x")], 2.0)
    found = figures([run], Slo())
    assert (found.requests, found.failed) == (3, 2)
    assert found.goodput == pytest.approx(0.5)
    assert found.tokens_s == pytest.approx(5.0)


def test_goodput_counts_only_what_keeps_both_objectives() -> None:
    run = Run("migrate", "steady", 0, [sample(), sample(ttft=2.0), sample(gap=0.2)], 1.0, worker_s=3.0)
    found = figures([run], Slo(ttft_s=1.0, tpot_s=0.05))
    assert found.failed == 0
    assert found.good_share == pytest.approx(1 / 3)
    assert found.worker_s_per_good == pytest.approx(3.0)
    assert found.tpot[1] == pytest.approx(10.0)


def test_report_names_what_failed_and_the_ratio(tmp_path: Path) -> None:
    calm = Run(Kind.STOCK.value, Workload.LONG.value, 0, [sample()] * 4, 1.0, worker_s=1.0)
    down = Run(Kind.STOCK.value, Workload.SCALE_DOWN.value, 0, [sample(gap=0.04)] * 3 + [sample(tokens=3)], 1.0)
    down.events = [Event("decode2 ends", 0.0, 1.5)]
    raw = tmp_path / "raw.json"
    report = Report(machine(), "tiny-llama", "auto", SCALE, Slo(), "today", [calm, down], errors=["vllm: no"])
    raw.write_bytes(msgspec.json.encode(report))
    write_report(tmp_path / "report.md", raw)
    text = (tmp_path / "report.md").read_text()
    assert "| scale-down, dynamo | 1 of 4 | 0 | 4.00 |" in text
    assert "- vllm: no" in text


def test_a_report_shows_the_files_that_are_there(tmp_path: Path) -> None:
    runs = [crowd_run(kind, repeat, 900.0, "5.0", 20.0) for kind in ("migrate-agg", "dynamo-agg") for repeat in (0, 1)]
    crowd = Crowd(machine(), "a model", "today", Load(), {}, runs=runs)
    (tmp_path / "crowd-gpu.json").write_bytes(msgspec.json.encode(crowd))
    write_report(tmp_path / "report.md", tmp_path / "serving-cpu.json")
    text = (tmp_path / "report.md").read_text()
    assert "Streams without migrations: a model" in text and "crowd-gpu.json" in text and "Open workloads" not in text


def test_merging_keeps_what_was_not_run_again() -> None:
    old = Report({}, "m", "auto", SCALE, Slo(), "", [Run("a", "steady", 0, [], 1.0), Run("b", "steady", 0, [], 1.0)])
    new = Report({}, "m", "auto", SCALE, Slo(), "", [Run("b", "steady", 0, [], 2.0)])
    assert [(run.system, run.duration_s) for run in merge(old, new).runs] == [("a", 1.0), ("b", 2.0)]


def test_profile_counts_the_innermost_function(tmp_path: Path) -> None:
    raw = tmp_path / "spy.txt"
    raw.write_text("main (/x/components/a.py);pack (/x/components/messages.py) 3\nmain (/x/components/a.py) 1\n")
    profile = self_time(raw, "now", "DecodeWorker0", 15)
    assert profile.top[0] == ("pack (x/components/messages.py)", 0.75)
    assert profile.ours[0] == ("pack (x/components/messages.py)", 0.75)


def test_memory_that_grows_is_not_flat() -> None:
    times = [2.0 * n for n in range(400)]
    assert Life("w", 1, times, [300.0 + (n % 3) for n in range(400)]).is_flat()
    assert not Life("w", 1, times, [300.0 + 0.2 * n for n in range(400)]).is_flat()


def crowd_run(system: str, repeat: int, tokens: float, gap: str, ttft: float) -> CrowdRun:
    seen = Seen(tokens, 100, 2, [ttft, ttft], {gap: 100}, cpu_s=0.1)
    return CrowdRun(system, 8, repeat, 2.0, seen, {"front": 0.001 * tokens})


def test_streams_are_compared_over_the_repeats_that_both_have() -> None:
    runs = [crowd_run("migrate-agg", repeat, 900.0, "5.0", 20.0) for repeat in range(4)]
    runs += [crowd_run("dynamo-agg", repeat, 1000.0, "4.0", 10.0) for repeat in range(3)]
    crowd = Crowd(machine(), "a model", "today", Load(), {}, runs=runs)
    cells = [
        [cell.strip() for cell in line.split("|")] for line in crowd_report.lines(crowd) if line.startswith("| 8 |")
    ]
    assert cells[0][2:6] == ["0.900 (0.900 to 0.900)", "1.250 (1.250 to 1.250)", "2.000 (2.000 to 2.000)", "3"]
    assert cells[0][6] == "450 / 500 / -"


def chat_turn(system: str, repeat: int, turn: int, ttft: float, cached: int) -> Turn:
    return Turn(system, 6, repeat, 0, turn, ttft, 100, cached)


def test_chats_are_compared_by_their_later_turns() -> None:
    turns = [chat_turn(system, repeat, 0, 900.0, 0) for system in ("migrate-agg", "dynamo-agg") for repeat in (0, 1)]
    turns += [chat_turn("migrate-agg", repeat, 1, 30.0, 80) for repeat in (0, 1)]
    turns += [chat_turn("dynamo-agg", repeat, 1, 20.0, 90) for repeat in (0, 1, 2)]
    text = chat_report.lines(Chats(machine(), "a model", "today", turns))
    cells = [cell.strip() for line in text if line.startswith("| agg, 6") for cell in line.split("|")]
    assert cells[2:7] == [
        "-0.100 (-0.100 to -0.100)",
        "1.50 (1.50 to 1.50)",
        "1.50 (1.50 to 1.50)",
        "0.800 / 0.900",
        "30 / 20",
    ]
    assert chat_report.lines(Chats(machine(), "a model", "today")) == []


def test_handoffs_are_compared_ratio_first() -> None:
    answers = [Answer(kind, 1, took, took, took, took, 1e9) for kind, took in (("migrate", 0.1), ("dynamo", 0.2))]
    text = handoff.section(Measured(machine(), "a model", "today", 8192, 64, {}, answers))
    assert "| transfer p50 | 0.5 | 100.0 ms | 200.0 ms |" in text
    assert handoff.section(Measured(machine(), "a model", "today", 8192, 64, {})) == []


async def test_a_stream_of_a_drain_is_read_when_it_has_ended() -> None:
    events = [
        {"choices": [{"text": "a", "finish_reason": None}]},
        {"choices": [{"text": "b", "finish_reason": "length"}]},
    ]

    async def answer(request: web.Request) -> web.Response:
        failed = [{"error": "lost"}] if (await request.json())["max_tokens"] == 1 else []
        return web.Response(text="".join(f"data: {json.dumps(event)}\n\n" for event in [*events, *failed]))

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as session:
        stream = Stream()
        await stream.run(session, {"max_tokens": 2})
        assert (stream.text, stream.ended, len(stream.times)) == ("ab", True, 2)
        with pytest.raises(MigrateError, match="lost"):
            await Stream().run(session, {"max_tokens": 1})


async def test_a_client_counts_tokens_and_gaps_of_its_window_alone() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        wanted = (await request.json())["max_tokens"]
        reply = web.StreamResponse()
        await reply.prepare(request)
        for number in range(0, wanted, 2):  # Two tokens in a chunk, and a chunk in two parts.
            await reply.write(b'data: {"choices":[{"text":"')
            await asyncio.sleep(0.01)
            await reply.write(b'ab"}]}\n\nda' if number + 2 < wanted else b'ab"}]}\n\n')
            if number + 2 < wanted:
                await asyncio.sleep(0.01)
                await reply.write(b"ta: {}\n\n")
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": wanted}})
        await reply.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
        return reply

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        now = time.monotonic()
        order = Order(str(server.make_url("")).rstrip("/"), "m", (1,), 2, 4, 8, now, now + 60.0, now + 0.5, "s")
        client = Client(order, session)
        await asyncio.sleep(0)
        seen = await client.run()
    assert seen.errors == ["not all streams ended in time"]
    assert seen.requests >= 2 and len(seen.ttft_ms) == seen.requests
    # Of an answer of n tokens n - 1 pieces are read, or n where n is odd; its tokens are shared out among them.
    assert seen.tokens > 8 and seen.tokens / 2 <= seen.chunks <= seen.tokens + 1e-6
    assert sum(seen.gaps.values()) == seen.chunks - seen.requests


async def test_a_client_names_what_it_did_not_get() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=503, text="nobody")

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        now = time.monotonic()
        order = Order(str(server.make_url("")).rstrip("/"), "m", (0,), 1, 4, 8, now, now + 0.1, now + 5.0, "s")
        seen = await Client(order, session).run()
    assert seen.requests == 0 and "503: nobody" in seen.errors[0]


@pytest.mark.parametrize("kind", [Kind.STOCK, Kind.STOCK_AGG, Kind.OURS, Kind.OURS_AGG])
def test_workers_of_every_system_take_the_gpus_in_turn(kind: Kind, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    save_file({}, model / "model.safetensors")
    engine = {"dtype": "bfloat16", "load-format": "dummy"}
    parts = parts_of(kind, str(model), 8000, Transport.AUTO, tmp_path, (), engine, (4, 6))
    workers = [part for part in parts if part.role != "front"]
    expected = ["4", "6", "4"] if kind in (Kind.STOCK, Kind.OURS) else ["4", "6"]
    assert [part.environment["CUDA_VISIBLE_DEVICES"] for part in workers] == expected
    for part in workers:
        said = " ".join(part.command) + part.environment.get("DYN_MIGRATE_CONFIG", "")
        assert "bfloat16" in said and "dummy" in said


def test_the_report_is_made_of_the_raw_files_as_they_are_kept(tmp_path: Path) -> None:
    write_report(tmp_path / "report.md", Path("benchmarks/results/serving-cpu.json"))
    made = (tmp_path / "report.md").read_text()
    assert "crowd-gpu-lengths.json" in made and "chat" in made.lower()
