# SPDX-License-Identifier: Apache-2.0
"""Continues a guided request that comes with tokens in the middle of its grammar.

vLLM compiles a request's grammar on a thread when the request arrives, and advances it by the tokens of each step.
Tokens from another worker are replayed into it in the same way, one after the other, so that a reasoning parser in
front of the grammar starts it at the same token: tokens that come with the request on vLLM's compiling thread, later
ones between two steps. Until then vLLM must not run the request (``ready``).

Threading: the engine core's thread. Errors: ``SessionError`` when the grammar cannot be compiled here or refuses a
token.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

from components.errors import SessionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.structured_output import StructuredOutputManager


_OPTIONS = ("reasoning_parser", "enable_in_reasoning", "disable_any_whitespace", "disable_additional_properties")
"""Configuration that also determines which tokens a grammar allows."""


def guide_of(manager: StructuredOutputManager, request: Request) -> str:
    """What guides a request's tokens, beside its parameters; empty: nothing.

    vLLM uses the backend of an engine's first guided request for all others.
    """
    guided = request.structured_output_request
    grammar = None if guided is None else guided.grammar
    if not isinstance(grammar, StructuredOutputGrammar):
        return ""
    config = manager.vllm_config.structured_outputs_config
    options = [f"{name}={value}" for name in _OPTIONS if (value := getattr(config, name))]
    return " ".join([type(grammar).__name__, *options])


@dataclass
class Prefix:
    """A request at an earlier number of tokens: the fields that vLLM reads to advance a grammar."""

    request_id: str
    prompt_token_ids: list[int] | None
    all_token_ids: list[int]
    structured_output_request: StructuredOutputRequest
    use_structured_output: bool = True


class Replay:
    """The grammar of one request; see the module docstring."""

    def __init__(self, manager: StructuredOutputManager, request: Request) -> None:
        guided = request.structured_output_request
        if guided is None:
            raise SessionError(f"request {request.request_id} has no grammar")
        self._manager = manager
        self._guided = guided
        compiled = guided._grammar
        prompt = request.prompt_token_ids
        self._prefix: Any = Prefix(
            request.request_id, prompt, list(prompt or ()), dataclasses.replace(guided, _grammar=None)
        )
        self._count = 0
        # vLLM's own status for this leads to WAITING, where a request would start over.
        request.status = RequestStatus.PREEMPTED if request.num_output_tokens else RequestStatus.WAITING
        guided.grammar = manager.executor.submit(self._from_the_beginning, compiled, list(request.output_token_ids))

    def _from_the_beginning(self, compiled: object, tokens: Sequence[int]) -> StructuredOutputGrammar:
        grammar = compiled.result() if isinstance(compiled, Future) else compiled
        if not isinstance(grammar, StructuredOutputGrammar):
            raise SessionError(f"the grammar could not be compiled: {grammar}")
        self._prefix.structured_output_request.grammar = grammar
        self._accept(tokens)
        return grammar

    def _accept(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._prefix.all_token_ids.append(token)
            if not self._manager.accept_tokens(self._prefix, [token]):
                raise SessionError(f"the grammar refuses output token {self._count}, which another engine made")
            self._count += 1

    @property
    def ready(self) -> bool:
        """True once the grammar has followed the request's first tokens. Raises ``SessionError`` when it cannot."""
        grammar = self._guided.grammar
        if isinstance(grammar, Exception):
            raise SessionError(f"the grammar cannot be continued here: {grammar}") from grammar
        return grammar is not None

    def catch_up(self, output_token_ids: Sequence[int]) -> None:
        """Replay newer tokens. The grammar must be ready."""
        if not self.ready:
            raise SessionError("the grammar is still being compiled here")
        self._accept(output_token_ids[self._count :])
        then = self._prefix.structured_output_request
        self._guided.reasoning_ended, self._guided.reasoner = then.reasoning_ended, then.reasoner
