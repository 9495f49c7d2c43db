# SPDX-License-Identifier: Apache-2.0
"""Configuration of every component: one model each, every field typed, with a default and a description.

Keys have dashes in YAML and on the command line. An unknown key is an error that names the nearest known one.
Precedence: the component's key on the command line, ``Common`` on the command line, the component's key in the file,
``Common`` in the file, the default. A component's process reads its part with ``load_component_config``.
"""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from components import env, yamltext
from components.address import is_any
from components.errors import ConfigError


def dashed(name: str) -> str:
    """A field's key in files and on the command line."""
    return name.replace("_", "-")


def _reachable(value: str) -> str:
    if is_any(value):
        raise ValueError("that is where to listen, not where others reach this host: write its name or address")
    return value


Host = Annotated[str, AfterValidator(env.host)]
ReachableHost = Annotated[Host, AfterValidator(_reachable)]


RouterMode = Literal["kv", "round-robin", "random", "power-of-two", "least-loaded", "device-aware-weighted", "direct"]
Weight = Literal[
    "overlap-score-credit",
    "overlap-score-credit-decay",
    "prefill-load-scale",
    "decode-active-request-weight",
    "host-cache-hit-weight",
    "disk-cache-hit-weight",
    "temperature",
]


class ComponentConfig(BaseModel):
    """Fields of every component."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=dashed, populate_by_name=True, allow_inf_nan=False
    )

    model: str = Field("smollm2", description="Hugging Face folder or name, or smollm2, tiny-llama, tiny-mixtral")
    served_model_name: str = Field("", description="Name that clients use; empty takes the model's own")
    replicas: int = Field(1, ge=0, le=1024, description="Processes to start")
    lora_modules: dict[str, str] = Field(
        default_factory=dict, description="LoRA adapters, to be set in Common: name for clients, and PEFT folder"
    )


class FrontendConfig(ComponentConfig):
    """Dynamo's own OpenAI frontend; its router chooses the worker of each request."""

    host: Host = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on; further replicas take the next ones")
    router_mode: RouterMode = Field("kv", description="How a worker is chosen; kv knows which prompts are cached where")
    router_weights: dict[Weight, float] = Field(
        default_factory=dict, description=f"Weights of router-mode kv: {', '.join(get_args(Weight))}"
    )
    router_policy_config: str = Field("", description="File of Dynamo's with policies and queues of its router")
    kv_events: bool = Field(True, description="Workers tell the router what they cache; false: the router guesses")
    migration_limit: int = Field(
        64, ge=0, description="Times a request may be sent to another worker, after a move or the loss of one; 0: never"
    )
    session_affinity_s: int | None = Field(None, ge=1, description="Seconds for which a session keeps its worker")
    active_decode_blocks_threshold: float | None = Field(
        None, ge=0, le=1, description="Share of KV blocks in use above which a worker is busy; all busy: 529"
    )
    active_prefill_tokens_threshold: int | None = Field(
        None, ge=0, description="Prompt tokens under way above which a worker is busy"
    )
    active_prefill_tokens_threshold_frac: float | None = Field(
        None, ge=0, description="The same as a share of max-num-batched-tokens"
    )
    frontend_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of dynamo.frontend, without their dashes"
    )


class PlannerConfig(ComponentConfig):
    """Dynamo's planner with the migration plugin."""

    policy_file: str = Field("configs/policy.yaml", description="Policies that decide migrations; see docs/planner.md")
    interval_s: int = Field(1, ge=1, description="Seconds between two decisions")
    decode_workers: tuple[int, int] | None = Field(
        None, description="Fewest and most decode workers; without it their number stays as it is"
    )
    prefill_workers: tuple[int, int] | None = Field(None, description="The same for prefill workers")
    started: dict[str, int] = Field(
        default_factory=dict, description="Workers by role that the graph starts with; dynamo serve fills it in"
    )
    scale_up_usage: float = Field(0.85, gt=0, description="KV share of any decode worker that asks for another one")
    scale_down_usage: float = Field(0.35, ge=0, description="KV share of every decode worker that asks for one fewer")
    planner_args: dict[str, Any] = Field(default_factory=dict, description="Further keys for Dynamo's planner")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, bounds in (("decode-workers", self.decode_workers), ("prefill-workers", self.prefill_workers)):
            if bounds is not None and not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"{key} {list(bounds)}: write [fewest, most], at least 1 and in this order")
        if self.scale_down_usage >= self.scale_up_usage:
            raise ValueError(
                f"scale-down-usage ({self.scale_down_usage:g}) must be below scale-up-usage ({self.scale_up_usage:g})"
            )
        return self


class WorkerConfig(ComponentConfig):
    """An engine worker: prefill, decode or both."""

    engine: Literal["vllm", "paged"] = Field("vllm", description="Inference engine; paged has KV blocks but no model")
    max_model_len: int = Field(4096, ge=16, description="Longest prompt and answer together, in tokens")
    block_size: int = Field(32, ge=8, description="Tokens per KV block")
    kv_memory_gib: float = Field(1.0, gt=0, description="Memory for KV blocks per worker, in GiB")
    dtype: str = Field(
        "auto",
        description="bfloat16, float16, float32, or auto: the model's, but float32 on x86 without AVX-512",
    )
    tensor_parallel_size: int | tuple[int, ...] = Field(
        1, description="GPUs per worker, or a list with those of each replica; the last one is for all further ones"
    )
    devices: tuple[tuple[int, ...], ...] = Field(
        (), description="GPU indices for each replica, [[0], [1]]; [[0], [0]]: two share a GPU; empty for CPU"
    )
    max_num_seqs: int = Field(16, ge=1, description="Requests that run at once")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Tokens per step; empty takes vLLM's choice")
    enable_prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prefixes")
    enforce_eager: bool | None = Field(
        None, description="No CUDA graphs and no compilation; empty: as long as there are no devices"
    )
    integrity: Literal["tail", "full", "off"] = Field("tail", description="Which KV blocks are checksummed")
    transfer: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the transfer agent: {backends: [tcp]} does without NIXL; see docs/transfer.md",
    )
    advertise_host: ReachableHost = Field("127.0.0.1", description="Address under which other hosts reach this worker")
    drain_grace_s: float = Field(60.0, ge=0, description="Seconds to move requests away after SIGTERM")
    lease_s: float = Field(
        60.0, gt=0, description="Seconds for which a request on the move is kept without a word from its other worker"
    )
    tool_call_parser: str = Field("", description="Dynamo's parser of tool calls for this model, for example hermes")
    reasoning_parser: str = Field("", description="Dynamo's parser of reasoning for this model, for example qwen3")
    seed: int = Field(0, ge=0, description="Seed of the engine")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of dynamo.vllm without their dashes, or options of paged"
    )

    @property
    def engine_flags(self) -> dict[str, Any]:
        """``engine_args`` by the names of flags."""
        return {dashed(key): value for key, value in self.engine_args.items()}

    @property
    def ranks(self) -> tuple[int, ...]:
        """Tensor-parallel sizes of the replicas; the last one is for all further ones."""
        size = self.tensor_parallel_size
        return (size,) if isinstance(size, int) else size

    def ranks_of(self, replica: int) -> int:
        """Tensor-parallel size of one replica."""
        return self.ranks[min(replica, len(self.ranks) - 1)]

    @model_validator(mode="after")
    def _has_ranks(self) -> Self:
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"tensor-parallel-size {self.tensor_parallel_size}: 1 or more, or a list of such numbers")
        return self

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.engine == "paged" and self.lora_modules:
            raise ValueError("lora-modules: the paged engine has no model that an adapter could change; use vllm")
        return self

    @model_validator(mode="after")
    def _devices_are_taken_once(self) -> Self:
        if any(len(replica) != len(set(replica)) or min(replica, default=0) < 0 for replica in self.devices):
            raise ValueError(f"devices {[list(d) for d in self.devices]}: each GPU once in a replica, numbered from 0")
        return self

    @property
    def sharing(self) -> int:
        """Most replicas that have the same GPU."""
        return max(Counter(index for replica in self.devices for index in replica).values(), default=0)


T = TypeVar("T", bound=ComponentConfig)
M = TypeVar("M", bound=BaseModel)


class Given(str):
    """A value from the command line: text for keys with text, YAML for others."""

    def read(self, field: FieldInfo, where: str) -> Any:
        """The parsed value. In a text YAML's quotes alone count: ``::``, ``on`` and ``1:20`` stand for themselves."""
        if not _holds_text(field):
            return yamltext.parse(self, where)
        quoted = len(self) > 1 and self[0] == self[-1] and self[0] in "'\""
        return str(yamltext.parse(self, where) if quoted else self)


def _holds_text(field: FieldInfo) -> bool:
    return field.annotation is str or (bool(_choices(field)) and all(isinstance(c, str) for c in _choices(field)))


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _meant(field: FieldInfo, value: Any) -> Any:
    """YAML reads a bare ``off`` in a file as false."""
    word = {True: "on", False: "off"}.get(value, "") if isinstance(value, bool) else ""
    return word if word in _choices(field) else value


def nearest(word: str, known: list[str]) -> str:
    """Ends an error message: a suggestion, or the list of known names."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def parse(model: type[T], component: str, values: dict[str, Any]) -> T:
    """Validate one component's values. Raises ``ConfigError`` with the value and the fix."""
    known = {dashed(name): field for name, field in model.model_fields.items()}
    read = {}
    for key, value in values.items():
        field = known.get(dashed(key))
        if field is None:
            raise ConfigError(f"{component} has no key {key!r}{nearest(key, list(known))}")
        where = f"{component}.{dashed(key)}"
        read[dashed(key)] = value.read(field, where) if isinstance(value, Given) else _meant(field, value)
    return validated(model, component, read)


def validated(model: type[M], where: str, values: dict[str, Any]) -> M:
    """The model with these values. Raises ``ConfigError`` with the first wrong one and its fix."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in (where, *first["loc"]) if part)
        shown = "" if isinstance(first.get("input"), dict) else f" = {first.get('input')!r}"
        quote = "; quote it" if first["type"] == "string_type" else ""
        raise ConfigError(f"{path}{shown}: {first['msg'].removeprefix('Value error, ')}{quote}") from error


def load_component_config(model: type[T]) -> T:
    """This process's configuration, from ``DYN_MIGRATE_CONFIG``."""
    return parse(model, env.COMPONENT.read() or model.__name__, env.CONFIG.read())
