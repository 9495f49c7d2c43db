# SPDX-License-Identifier: Apache-2.0
"""Every private name of vLLM that ``components.engine.vllm`` uses exists in the installed vLLM, with its meaning.

A release that moves a name fails here, in seconds and by name, not in a step of an engine. mypy checks the same names
against vLLM's annotations; ``test_vllm_migration`` uses them.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from typing import Any

import pytest

pytest.importorskip("vllm")

NAMES = {
    "vllm.v1.core.sched.scheduler.Scheduler": """
        block_size cache_config connector deferred_frees deferred_waiting failed_recving_kv_req_ids finished_req_ids
        finished_recving_kv_req_ids kv_cache_config kv_cache_manager kv_holding_waiting max_model_len
        max_num_active_reqs needs_kv_cache_zeroing num_spec_tokens num_waiting_for_streaming_input requests running
        scheduler_reserve_full_isl use_v2_model_runner vllm_config waiting _enqueue_waiting_request _holds_kv_blocks
        _inflight_prefill_reserved_blocks _inflight_prefills _is_blocked_waiting_status _request_remaining_blocks
        finish_requests grammar_compile_error_reqs structured_output_manager get_request_counts has_finished_requests
        schedule shutdown update_from_output""",
    "vllm.v1.core.kv_cache_manager.KVCacheManager": """
        allocate_slots block_pool coordinator get_block_ids get_blocks get_computed_blocks pop_blocks_for_free
        remove_skipped_blocks truncate_computed_blocks""",
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": """
        group_block_sizes retention_interval single_type_managers""",
    "vllm.v1.core.block_pool.BlockPool": "blocks free_blocks get_num_free_blocks null_block",
    "vllm.v1.core.kv_cache_utils.KVCacheBlock": "block_id ref_cnt",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": """
        add_local_computed_blocks allocate_external_computed_blocks allocate_new_blocks block_pool block_size free
        get_num_skipped_tokens kv_cache_spec new_block_ids records_new_block_ids req_to_blocks""",
    "vllm.v1.core.single_type_kv_cache_manager": """
        ChunkedLocalAttentionManager FullAttentionManager MambaManager SlidingWindowManager""",
    "vllm.v1.core.single_type_kv_cache_manager.MambaManager": "mamba_cache_mode num_speculative_blocks",
    "vllm.v1.kv_cache_interface.KVCacheSpec": "prefix_replay_tokens",
    "vllm.v1.kv_cache_interface.UniformTypeKVCacheSpecs": "kv_cache_specs",
    "vllm.v1.core.sched.request_queue.RequestQueue": "prepend_request remove_requests",
    "vllm.v1.request.Request": """
        _all_token_ids _output_token_ids all_token_ids append_output_token_ids client_index is_prefill_chunk
        kv_transfer_params lora_request
        max_tokens mm_features num_computed_tokens num_in_flight_tokens num_output_tokens num_preemptions
        num_prompt_tokens num_tokens output_token_ids prefill_stats priority prompt_embeds prompt_token_ids request_id
        resumable sampling_params status structured_output_request use_structured_output""",
    "vllm.v1.request.RequestStatus": "FINISHED_ABORTED PREEMPTED RUNNING WAITING WAITING_FOR_REMOTE_KVS",
    "vllm.v1.structured_output.StructuredOutputManager": "executor vllm_config",
    "vllm.v1.structured_output.request.StructuredOutputRequest": "_grammar grammar reasoner reasoning_ended",
    "vllm.v1.structured_output.backend_types": "StructuredOutputGrammar",
    "vllm.config.StructuredOutputsConfig": """
        disable_additional_properties disable_any_whitespace enable_in_reasoning reasoning_parser""",
    "vllm.v1.core.sched.output.SchedulerOutput": "scheduled_cached_reqs kv_connector_metadata",
    "vllm.v1.core.sched.output.CachedRequestData": "resumed_req_ids",
    "vllm.v1.core.sched.output.NewRequestData": "prefill_token_ids prompt_token_ids num_computed_tokens",
    "vllm.v1.engine.EngineCoreOutput": "kv_transfer_params new_token_ids request_id",
    "vllm.v1.engine.EngineCoreRequestType": "WAKEUP",
    "vllm.v1.engine.core.EngineCoreProc": "_handle_client_request input_queue model_executor scheduler",
    "vllm.v1.engine.async_llm.AsyncLLM": "abort engine_core generate output_processor",
    "vllm.v1.engine.output_processor.OutputProcessor": "external_req_ids",
    "vllm.v1.engine.core_client.AsyncMPClient": "call_utility_async",
    "vllm.v1.engine.exceptions": "EngineDeadError EngineGenerateError",
    "vllm.config.VllmConfig": "use_v2_model_runner",
    "vllm.distributed.kv_transfer": "get_kv_transfer_group",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1": """
        _get_connector_metadata build_connector_worker_meta handle_preemptions has_pending_push_work on_new_request""",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.SupportsHMA": "request_finished_all_groups",
    # Model runner V1
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": """
        _init_mrope_positions device input_batch requests sampler uses_mrope vllm_config""",
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector.MultiConnector": "sub_connectors",
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector.MultiKVConnectorWorkerMetadata": "metadata",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector.OffloadingConnector": "connector_scheduler",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler.OffloadingConnectorScheduler": """
        _current_batch_allocated_block_ids""",
    "vllm.v1.worker.gpu_input_batch.InputBatch": "vocab_size",
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": "generator",
    "vllm.v1.sample.sampler.Sampler": "use_fp64_gumbel",
    # Model runner V2
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": "add_requests finish_requests req_states vllm_config",
    "vllm.v1.worker.gpu.states.RequestState": "free_indices",
    "vllm.v1.worker.gpu.sample.states.SamplingStates": "seeds",
}

PARAMETERS = {
    "vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots": """
        request num_new_tokens num_new_computed_tokens new_computed_blocks num_external_computed_tokens
        delay_cache_blocks full_sequence_must_fit reserved_blocks has_scheduled_reqs""",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.remove_skipped_blocks": """
        request_id processed_computed_tokens num_prompt_tokens""",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.truncate_computed_blocks": "blocks num_computed_tokens",
    "vllm.v1.core.sched.scheduler.Scheduler.finish_requests": "request_ids finished_status",
    "vllm.v1.core.sched.scheduler.Scheduler.schedule": "throttle_prefills",
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output": "scheduler_output model_runner_output",
    "vllm.v1.structured_output.StructuredOutputManager.accept_tokens": "request new_token_ids",
    "vllm.v1.executor.Executor.collective_rpc": "method args",
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": """
        req_id prompt_token_ids mm_features sampling_params generator block_ids num_computed_tokens output_token_ids
        lora_request""",
    "vllm.v1.worker.gpu.states.RequestState.add_request": "req_id prompt_len all_token_ids num_computed_tokens",
    "vllm.v1.worker.gpu.sample.gumbel.gumbel_sample": "logits seed pos",
}


def find(path: str) -> Any:
    """A module, or what is in one."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"no module of {path}")


def names_of(owner: Any) -> set[str]:
    """Attributes of a module or class, with those that its methods give to ``self``."""
    found = set(dir(owner))
    for cls in inspect.getmro(owner) if inspect.isclass(owner) else ():
        found |= set(getattr(cls, "__annotations__", ()))
        if cls.__module__.startswith("vllm"):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
    return found


@pytest.mark.parametrize("path", NAMES)
def test_the_installed_vllm_has_every_name(path: str) -> None:
    missing = set(NAMES[path].split()) - names_of(find(path))
    assert not missing


@pytest.mark.parametrize("path", PARAMETERS)
def test_what_is_called_takes_the_arguments(path: str) -> None:
    missing = set(PARAMETERS[path].split()) - set(inspect.signature(find(path)).parameters)
    assert not missing


def test_the_block_that_stands_for_none_has_number_0() -> None:
    from vllm.v1.core.block_pool import BlockPool

    assert BlockPool(4, True, 16).null_block.block_id == 0


def test_an_internal_id_is_the_callers_with_eight_digits_behind_it() -> None:
    from types import SimpleNamespace

    from vllm.v1.engine.input_processor import InputProcessor

    from components.engine.vllm.compat.requests import external_id

    request: Any = SimpleNamespace(request_id="a-1-b", external_req_id=None)
    InputProcessor.assign_request_id(request)
    assert request.request_id != "a-1-b" and external_id(request) == "a-1-b"


def test_vllm_reads_nothing_of_a_request_to_advance_its_grammar_but_what_a_replay_shows() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    from components.engine.vllm.compat.grammars import Prefix

    read: set[str] = set()
    methods, seen = ["accept_tokens"], set()
    while methods:
        seen.add(method := methods.pop())
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(getattr(StructuredOutputManager, method))))):
            match node:
                case ast.Attribute(value=ast.Name("request")):
                    read.add(node.attr)
                case ast.Call(func=ast.Attribute(value=ast.Name("self"), attr=name), args=[ast.Name("request"), *_]):
                    methods += {name} - seen
    assert read == {field.name for field in dataclasses.fields(Prefix)}


def test_the_second_runner_resumes_from_all_tokens_and_samples_without_state() -> None:
    """What ``RunnerPort`` of V2 relies on, read from vLLM's source: the runner itself needs a GPU."""
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.sample import sampler, states

    added = inspect.getsource(model_runner.GPUModelRunner.add_requests)
    assert "all_token_ids=new_req_data.prefill_token_ids" in added
    removed = inspect.getsource(model_runner.GPUModelRunner.finish_requests)
    assert "preempted_req_ids" in removed
    whole = inspect.getsource(sampler) + inspect.getsource(states)
    assert "torch.Generator" not in whole and "generator=" not in whole


def test_an_unknown_release_is_one_error_that_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from components import versions
    from components.engine.vllm.compat import require_tested_vllm
    from components.errors import ConfigError

    assert require_tested_vllm() == versions.installed("vllm")
    monkeypatch.setattr(versions, "installed", lambda _: "0.99.0")
    with pytest.raises(ConfigError, match=r"vllm 0\.99\.0 is installed.*0\.31\.0"):
        require_tested_vllm()
