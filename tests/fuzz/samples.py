# SPDX-License-Identifier: Apache-2.0
"""Valid inputs of all targets, made by the code: ``python -m tests.fuzz --samples`` writes them to the corpus."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import msgspec
import numpy as np
import torch

from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.protocol import (
    EngineStats,
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    RequestPhase,
    Sampling,
    TokenLogprob,
)
from components.migration.link_wire import Said, Told
from components.migration.messages import (
    Attached,
    Counts,
    Decision,
    Handover,
    Mode,
    MoveRecord,
    Owner,
    PlannerReply,
    RequestRow,
    Ticket,
    Verdict,
    WorkerCall,
    WorkerOp,
    WorkerReply,
    WorkerState,
)
from components.transfer import AgentConfig, KVPool, TransferAgent
from components.transfer.control import record
from components.transfer.control.record import AgentRecord
from components.transfer.ids import AgentName, AgentRef, Epoch
from components.transfer.session import messages as session

ROOT = Path(__file__).parents[2]
R = RequestId("r")
LANDED = list(range(1, 41))
"""Tokens of a prompt whose blocks are here, while the request waits for its commit."""


def agent_record() -> AgentRecord:
    """A real agent's record."""
    agent = TransferAgent(AgentConfig(name="agent", namespace=uuid.uuid4().hex, backends=("local",), block_size=4))
    agent.start([KVPool(f"layer.{n}", torch.zeros((8, 4, 2)), 8, 0) for n in range(2)])
    try:
        return agent.record
    finally:
        agent.close()


def offer(epoch: str = "e") -> KVOffer:
    """Three blocks of a peer."""
    return KVOffer(R, (AgentRef(AgentName("peer"), Epoch(epoch)),), 4, (1, 2, 3), 11, 0)


def frozen(epoch: str = "e") -> Frozen:
    """The state of a request of nine tokens that has made three."""
    return Frozen(offer(epoch), (5, 6, 7), b"\x01" * 8, (1, 2, 3))


def request(epoch: str = "e") -> GenerateRequest:
    """One that lands."""
    sampling = Sampling(temperature=0.5, seed=3, max_tokens=20, stop_token_ids=(9,), logprobs=2)
    return GenerateRequest(R, tuple(range(1, 10)), sampling, output_token_ids=(5, 6, 7), landing=offer(epoch))


def calls(epoch: str = "e") -> list[WorkerCall]:
    """One of each kind, about life 5 of the request."""
    whole = request(epoch)
    ticket = Ticket(
        R, 5, whole.prompt_token_ids, msgspec.msgpack.encode(whole.sampling), "f", (5, 6, 7), tried=(1,), max_tokens=20
    )
    given = {"offer": offer(epoch), "tokens": (5, 6, 7), "frozen": frozen(epoch), "hold_s": 0.1, "ticket": ticket}
    more = {"owners": ((R, Owner(2, 5)),), "timeout_s": 1.0, "index": 1}
    return [WorkerCall(op, R, 5, **given, **more) for op in WorkerOp]  # type: ignore[arg-type]


def session_messages() -> list[session.Message]:
    """One of each kind, as a ``NixlBackend`` with eight blocks gets them."""
    blocks = session.pack(np.array([1, 2], np.int64))
    return [
        session.Ask(1, "r", blocks, blocks, (), 0, 1000),
        session.Ask(2, "r", blocks, b"", (4096, 8192), 4096, 1000),
        session.Landed(1, 0),
        session.Freed(1, 0),
        session.Ended(1, "transfer", "it broke", 10, 1, 0.1, 0.1, 0.1, "rc"),
        session.Stop(1),
        session.Hello(1, True),
    ]


def payload() -> dict[str, object]:
    """A request as Dynamo's frontend sends it."""
    return {
        "token_ids": [1, 2, 3],
        "sampling_options": {"temperature": 0.7, "top_p": 0.9, "seed": 1, "n": 1, "logit_bias": {"5": 1.5}},
        "stop_conditions": {"max_tokens": 5, "min_tokens": 1, "stop_token_ids_hidden": [2], "ignore_eos": False},
        "output_options": {"logprobs": 2, "prompt_logprobs": None},
        "routing": {"priority": 1, "lora_name": None, "cache_salt": "s"},
    }


def native_request() -> bytes:
    """A request in vLLM's own form."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from components.engine.vllm.native import Native, encode

    params = SamplingParams(temperature=0.5, seed=1, stop_token_ids=[3], logit_bias={5: 0.5}, max_tokens=9)
    return encode(Native(params, 1, LoRARequest("a", 1, "/nowhere"), "salt", trace_headers={"traceparent": "x"}))


def commits() -> list[bytes]:
    """Commits of a landed request, and calls that are none."""
    from components.engine.vllm.control import Call, Op

    offer = KVOffer(R, (AgentRef(AgentName("peer"), Epoch("1")),), 16, (100, 101, 102), len(LANDED) + 1, 0)
    states = [
        Frozen(offer, (7, 7)),
        Frozen(offer, (7, 7), b"\x01" * 8, (1,), use_within_s=5.0),
        Frozen(offer, (7, 7), checksums=(1, 2, 3), checked=(3,), guide="xgrammar"),
    ]
    calls = [Call(Op.COMMIT, RequestId("life"), frozen=state) for state in states]
    return [msgspec.msgpack.encode(call) for call in (*calls, Call(Op.RELEASE, RequestId("life")))]


def link_messages() -> list[msgspec.Struct]:
    """Of both directions."""
    said = [Said(number + 1, call) for number, call in enumerate((*calls(), WorkerCall(WorkerOp.ATTACH, R)))]
    item = Attached((GenerateOutput(0, (1, 2)),))
    answered, ended = (1, WorkerReply()), (1, Attached(end=True))
    return [
        *said,
        Said(1, WorkerCall(WorkerOp.DETACH)),
        Told((answered, (2, WorkerReply(left=3))), ((1, item), ended)),
        Told((answered,), ((1, item), (1, Attached(error=("session", "why"))), ended)),
        Told((answered,), ((1, Attached(moved=Owner(1, 2))), ended)),
        Told(((1, WorkerReply(error=("no_room", "full"))),)),
    ]


def states() -> list[WorkerState]:
    """A worker's whole table, and what has changed since."""
    stats, row = EngineStats(1, 0, 0, 0, 90, 100), RequestRow(1, R, RequestPhase.DECODE, 100, 5, 7)
    more = {"version": 2, "counts": Counts.of([(2, 70_000, 9), (9, 5, 9)]), "gone": (1,)}
    return [
        WorkerState("w", "decode", stats, version=1, whole=True, rows=(row, RequestRow(2, R, RequestPhase.WAITING, 9))),
        WorkerState("w", "decode", stats, rows=(msgspec.structs.replace(row, number=3),), **more),
    ]


def everything() -> dict[str, list[bytes]]:
    """Valid inputs by target."""
    encode = msgspec.msgpack.encode
    decision = Decision("balance", Verdict.MOVE, "why", "r", "a", "b", 1.0)
    output = GenerateOutput(
        0, (1,), (TokenLogprob(-0.5, 1, ((1, -0.5),)),), FinishReason.FROZEN, 3, ("session", "text"), 2
    )
    outcomes = [
        WorkerReply(error=("no_room", "full")),
        WorkerReply(moves=(MoveRecord("r", "a", "b", Mode.LIVE, True),)),
        *(WorkerReply(state=state) for state in states()),
        Attached((output,), Owner(1, 2)),
        Handover(Owner(1, 2), "f", 1, frozen(), True, True, (TokenLogprob(-0.5),)),
        PlannerReply((decision,)),
    ]
    config = {"model": "tiny-llama", "max-model-len": 512, "devices": [], "engine-args": {"step_s": 0.1}}
    snapshot = {"time_s": 1.0, "workers": [], "requests": [], "active": [], "bytes_per_s": 1e9}
    return {
        "record": [record.encode(agent_record())],
        "session": [encode(m) for m in session_messages()],
        "exchange": [encode(m) for m in session_messages()],
        "tcp": [encode({"blocks": b"\1\0\0\0", "unit": 0})],
        "handshake": [bytes(64), bytes(range(64)), b"dynmig1\n" + bytes(32)],
        "handshake-answer": [b"dynmig1\n" + bytes(64), b"dynmig2\n" + bytes(64)],
        "handover-answer": [encode({"storages": [(4096, 4096)]})],
        "messages": [encode(m) for m in (*calls(), *outcomes)],
        "worker": [encode(m) for m in calls("live")],
        "commit": commits(),
        "link": [encode(m) for m in link_messages()],
        "native": [native_request()],
        "openai": [json.dumps(payload()).encode()],
        "component-config": [json.dumps(config).encode()],
        "graph-config": [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))],
        "override": [b"--Common.model=smollm2", b"--DecodeWorker.engine-args={step_s: 0.1}"],
        "policy": [(ROOT / "configs" / "policy.yaml").read_bytes()],
        "snapshot": [json.dumps(snapshot).encode()],
        "trace": [
            b'{"timestamp": 1, "input_length": 10, "output_length": 5, "hash_ids": [1, 2]}\n',
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n",
            b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,log\n",
        ],
    }
