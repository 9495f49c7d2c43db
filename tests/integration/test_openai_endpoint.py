# SPDX-License-Identifier: Apache-2.0
"""The OpenAI endpoint under clients of every kind, on the served graph with the paged engine.

Malformed and generated requests, slow and vanished clients, 500 streams at once: no 5xx of this package, nothing left.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.graphs import MODEL, PAGED, PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
STREAMS = int(os.environ.get("DYNAMO_MIGRATE_TEST_STREAMS", "500"))
SPARE = 40
"""Descriptors that a process may have more after a test: pooled connections, files of logs."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("openai")
    graph = Graph(folder, overrides=(*PAGED, "--Common.max-num-seqs=300"), ETCD_LEASE_TTL="30")
    with graph.served(200):
        yield graph


def descriptors(graph: Graph) -> dict[int, int]:
    """Open descriptors of every process of the graph."""
    return {p.pid: p.num_fds() for p in psutil.Process(graph.process.pid).children(recursive=True)}


@pytest.fixture(autouse=True)
def nothing_left(served: Graph) -> Iterator[None]:
    served.complete("warm", 3)
    served.wait_until_idle()
    before = descriptors(served)
    yield
    served.wait_until_idle(timeout_s=120)
    end = time.monotonic() + 60
    while grown := {p: n - before[p] for p, n in descriptors(served).items() if n > before.get(p, 0) + SPARE}:
        assert time.monotonic() < end, f"descriptors that were left, by process: {grown}"
        time.sleep(1.0)
    assert set(descriptors(served)) == set(before), "a process has ended"


def url(graph: Graph, path: str = "completions") -> str:
    return f"http://127.0.0.1:{graph.port}/v1/{path}"


def body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 3, **more}


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a list": b"[]",
    "null": b"null",
    "another model": json.dumps(body(model="no such")).encode(),
    "no prompt": json.dumps({"model": MODEL}).encode(),
    "an empty prompt": json.dumps(body(prompt="")).encode(),
    "a prompt of tokens that do not exist": json.dumps(body(prompt=[2**31 - 1])).encode(),
    "a prompt of negative tokens": json.dumps(body(prompt=[-1])).encode(),
    "a long prompt": json.dumps(body(prompt="word " * 200_000)).encode(),
    "negative max_tokens": json.dumps(body(max_tokens=-1)).encode(),
    "huge max_tokens": json.dumps(body(max_tokens=2**40)).encode(),
    "max_tokens as text": json.dumps(body(max_tokens="many")).encode(),
    "temperature of -1": json.dumps(body(temperature=-1)).encode(),
    "temperature of 1e308": json.dumps(body(temperature=1e308)).encode(),
    "top_p of 2": json.dumps(body(top_p=2)).encode(),
    "seed beyond 64 bits": json.dumps(body(seed=2**70)).encode(),
    "negative seed": json.dumps(body(seed=-5)).encode(),
    "logit_bias of words": json.dumps(body(logit_bias={"x": "y"})).encode(),
    "many stops": json.dumps(body(stop=["x"] * 1000)).encode(),
    "logprobs of 1000": json.dumps(body(logprobs=1000)).encode(),
    "a control character": json.dumps(body(prompt="\x00\x01\x1b")).encode(),
}


@pytest.mark.parametrize("what", list(MALFORMED))
def test_malformed_requests_are_the_clients_fault(served: Graph, what: str) -> None:
    for path in ("completions", "chat/completions"):
        reply = httpx.post(
            url(served, path),
            content=MALFORMED[what],
            headers={"content-type": "application/json"},
            timeout=60,
            trust_env=False,
        )
        assert reply.status_code < 500, f"{path}: {reply.status_code} {reply.text[:300]}"


def test_more_than_one_answer_is_refused_in_words(served: Graph) -> None:
    # By the paged engine alone. Of the same refusal Dynamo's frontend may make a 500 on /v1/completions.
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "n": 3}
    reply = httpx.post(url(served, "chat/completions"), json=chat, timeout=60, trust_env=False)
    assert reply.status_code == 400
    assert "one answer to a request" in reply.text


def test_clients_that_vanish(served: Graph) -> None:
    request = json.dumps(body(prompt=PROMPT, max_tokens=2000, stream=True, ignore_eos=True)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(request) + request
    for number in range(60):
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            # In the middle of the head, of the body, and of the answer.
            client.sendall(whole[: (40, len(whole) - 20, len(whole))[number % 3]])
            if number % 3 == 2:
                client.settimeout(30)
                client.recv(100)


def test_clients_that_read_slowly_get_everything(served: Graph) -> None:
    expected = served.complete(PROMPT, 400, temperature=0)

    async def slow() -> str:
        text = ""
        more = {"stream": True, "temperature": 0, "ignore_eos": True}
        async with (
            httpx.AsyncClient(timeout=120, trust_env=False) as client,
            client.stream("POST", url(served), json=body(prompt=PROMPT, max_tokens=400, **more)) as reply,
        ):
            async for line in reply.aiter_lines():
                await asyncio.sleep(0.005)
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    async def all_of_them() -> list[str]:
        return list(await asyncio.gather(*(slow() for _ in range(8))))

    assert asyncio.run(all_of_them()) == [expected] * 8


def test_many_streams_at_once(served: Graph) -> None:
    async def one(client: httpx.AsyncClient, number: int) -> tuple[int, int]:
        tokens = 0
        request = body(prompt=f"{number} of many", max_tokens=20, stream=True, ignore_eos=True, temperature=0)
        async with client.stream("POST", url(served), json=request) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    tokens += bool(choices[0].get("finish_reason") == "length")
        return reply.status_code, tokens

    async def all_of_them() -> Counter[tuple[int, int]]:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            return Counter(await asyncio.gather(*(one(client, number) for number in range(STREAMS))))

    assert asyncio.run(all_of_them()) == Counter({(200, 1): STREAMS})


def test_generated_requests(served: Graph, tmp_path: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    found = httpx.get(f"http://127.0.0.1:{served.port}/openapi.json", timeout=30, trust_env=False)
    if found.status_code != 200:
        pytest.skip("this frontend serves no OpenAPI schema")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_dict(found.json())
    for path in ("/v1/completions", "/v1/chat/completions"):

        @given(case=schema[path]["POST"].as_strategy())
        @settings(
            max_examples=100,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )
        def run(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body |= {"model": MODEL, "max_tokens": 3}
            reply = case.call(base_url=f"http://127.0.0.1:{served.port}", timeout=60)
            assert reply.status_code < 500 or reply.status_code == 501, f"{case.body} {reply.status_code} {reply.text}"

        run()
