# SPDX-License-Identifier: Apache-2.0
"""Workers of Dynamo that see: questions about images are moved while they are answered."""

from __future__ import annotations

import base64
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.integration.graphs import ROOT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Seeing(Graph):
    """Its prompts are questions about a picture, which follows from the question."""

    def complete(self, prompt: str, count: int, **more: Any) -> str:
        pixels = Image.frombytes("RGB", (40, 30), random.Random(prompt).randbytes(40 * 30 * 3))
        file = io.BytesIO()
        pixels.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}]
        messages: Any = [{"role": "user", "content": parts}]
        reply = self.client.chat.completions.create(
            messages=messages, model=self.model, max_tokens=count, extra_body={"ignore_eos": True}, **more
        )
        assert reply.usage is not None and reply.usage.completion_tokens == count
        # Some words and a picture of 20 tokens.
        assert reply.usage.prompt_tokens > 20
        return reply.choices[0].message.content or ""


def test_questions_about_images_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow = str(ROOT / "tests" / "pillow")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([pillow, os.environ.get("PYTHONPATH", "")]))
    overrides = (
        "--AggWorker.replicas=2",
        "--AggWorker.kv-memory-gib=0.25",
        '--AggWorker.engine-args={"enable-multimodal": true}',
    )
    graph = Seeing(tmp_path, "agg", overrides, model="tiny-paddleocr-vl")
    try:
        graph.wait()

        def move(where: dict[str, str]) -> None:
            for request, worker in where.items():
                there = graph.another(worker)
                moves = [
                    graph.ask("migrate", request, target, mode)
                    for target, mode in ((there, "live"), (worker, "stop-and-copy"), (there, "replay"))
                ]
                assert all(m.get("ok") for m in moves), moves
                assert [m["mode"] for m in moves] == ["live", "stop-and-copy", "replay"]

        graph.disturbed([f"What is in picture {number}?" for number in range(4)], 1600, move, temperature=0)
        graph.wait_until_idle(workers=2)
    finally:
        assert graph.stop() == []
