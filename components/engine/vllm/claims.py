# SPDX-License-Identifier: Apache-2.0
"""What a source says of a request, compared with what is here: its offer, its tokens, its grammar.

Threading: the engine core's thread. Errors: ``SessionError``.
"""

from __future__ import annotations

from dataclasses import dataclass

from components.engine.groups import tables_of, why_unproven
from components.engine.kv import Frozen, KVOffer
from components.engine.vllm.compat.resumed import append_tokens
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.records import Record
from components.errors import SessionError


@dataclass
class Cache:
    """What the workers say of their KV caches once they have been asked."""

    num_ranks: int = 0
    bytes_per_block: int = 0
    divides: bool = False
    """Whether blocks of an engine of another tensor-parallel size can be taken."""


class Claims:
    """See the module docstring."""

    def __init__(self, port: SchedulerPort, cache: Cache) -> None:
        self._port = port
        self._cache = cache

    def why_unusable(self, offer: KVOffer) -> str | None:
        """What is wrong with an offer, or None."""
        size, tables = self._port.block_size, tables_of(offer)
        if min(offer.num_tokens, offer.room_tokens) < 0:
            return f"it has {offer.num_tokens} tokens and needs room for {offer.room_tokens}"
        if offer.block_size != size:
            return f"its blocks have {offer.block_size} tokens, ours {size}"
        local = [group.block_size for group in self._port.groups]
        if [table.block_size for table in tables] != local:
            return f"its groups have blocks of {[table.block_size for table in tables]} tokens, ours {local}"
        if not offer.agents or (len(offer.agents) != self._cache.num_ranks and not self._cache.divides):
            return (
                f"it is of {len(offer.agents)} tensor-parallel ranks, ours are {self._cache.num_ranks}, and KV caches "
                "of this model do not divide into heads"
            )
        for table in tables:
            if table.first < 0 or table.past < -(-offer.num_tokens // table.block_size):
                return f"it names {table.past} blocks for {offer.num_tokens} tokens"
        return None

    def require_usable(self, offer: KVOffer, frozen: Frozen | None = None) -> None:
        """Raise ``SessionError`` for an offer, or a state with it, that cannot be used."""
        reason = self.why_unusable(offer) or (why_unproven(frozen) if frozen is not None else None)
        if reason:
            raise SessionError(f"the source's offer cannot be used: {reason}")

    def append(self, record: Record, tokens: tuple[int, ...]) -> None:
        """Add the tokens that the source has made since."""
        request = record.request
        have = request.num_output_tokens
        if tuple(request.output_token_ids) != tokens[:have]:
            raise SessionError("the source's tokens differ from those this request started with")
        if request.num_prompt_tokens + len(tokens) > self._port.max_tokens:
            raise SessionError(f"{len(tokens)} output tokens are more than max_model_len allows")
        # vLLM itself checks those that a request enters with.
        if unknown := [token for token in tokens[have:] if not 0 <= token < self._port.vocab_size]:
            raise SessionError(f"{len(unknown)} tokens are not in the model's vocabulary of {self._port.vocab_size}")
        if len(tokens) > have:
            append_tokens(request, tokens[have:])
            record.needs_install = True
        if record.grammar is not None and record.grammar.ready:
            record.grammar.catch_up(request.output_token_ids)

    def continue_grammar(self, record: Record, frozen: Frozen) -> None:
        """Take a request's grammar to its last token."""
        if record.grammar is None:
            return
        record.grammar.catch_up(record.request.output_token_ids)
        here = self._port.guide_of(record.request)
        if frozen.guide not in ("", here):
            raise SessionError(f"{frozen.guide} guides the request at the source, {here} would here")


def require_same(tokens: tuple[int, ...], frozen: Frozen) -> None:
    """The worker commits what the source's engine has committed, or gets ``SessionError``."""
    if tokens != frozen.output_token_ids:
        raise SessionError("the source's engine has committed other tokens than its worker")
