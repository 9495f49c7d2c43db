# SPDX-License-Identifier: Apache-2.0
"""The client that tests ask with."""

from __future__ import annotations

import openai.types


def test_threads_need_not_complete_the_classes_of_the_first_answers() -> None:
    assert openai.types.Completion.__pydantic_complete__
    assert openai.types.CompletionChoice.__pydantic_complete__
