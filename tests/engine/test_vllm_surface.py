"""What we rely on in vLLM's internals. An upgrade of the pin fails here first, by the name of what moved."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import vllm
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1ModelRunner
from vllm.v1.worker.gpu_worker import Worker

SURFACE: list[tuple[Callable[..., Any], list[str]]] = [
    (FullAttentionManager.remove_skipped_blocks, ["request_id", "processed_computed_tokens", "num_prompt_tokens"]),
    (UnitaryKVCacheCoordinator.cache_blocks, ["request", "num_computed_tokens"]),
    (HybridKVCacheCoordinator.cache_blocks, ["request", "num_computed_tokens"]),
    (FullAttentionManager.pop_blocks_for_free, ["request_id"]),
    (FullAttentionManager._remove_blocks_in_range, ["request_id", "first_block", "last_block"]),
    (
        FullAttentionManager.get_num_blocks_to_allocate,
        [
            "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens",
            "num_tokens_main_model", "apply_admission_cap", "prefill_end",
        ],
    ),
    (BlockPool._maybe_evict_cached_block, ["block"]),
    (BlockPool.get_num_free_blocks, []),
    (FullAttentionSpec.merge, ["specs"]),
    (FullAttentionSpec.max_memory_usage_bytes, ["vllm_config"]),
    (KVCacheSpecRegistry.register, ["kvcache_spec_cls", "manager_class", "uniform_type_base_spec"]),
    (KVCacheSpecRegistry._ensure_registered, ["vllm_config"]),
    (AsyncScheduler.add_request, ["request"]),
    (AsyncScheduler._get_local_prefix_cache_hit, ["request"]),
    (KVCacheManager.create_kv_cache_blocks, ["blocks"]),
    (UnitaryKVCacheCoordinator.find_longest_cache_hit, ["block_hashes", "max_cache_hit_length"]),
    (HybridKVCacheCoordinator.find_longest_cache_hit, ["block_hashes", "max_cache_hit_length"]),
    (AsyncScheduler.update_from_output, ["scheduler_output", "model_runner_output"]),
    (AsyncScheduler._reserve_prefill_lookahead, ["request", "num_computed_tokens", "num_new_tokens"]),
    (SlidingWindowSpec.max_admission_blocks_per_request, ["max_in_flight_tokens", "max_model_len"]),
    (AsyncScheduler._preempt_request, ["request", "timestamp", "drop_stale_output"]),
    (AsyncScheduler._free_request, ["request", "delay_free_blocks"]),
    (CPUWorker.get_kv_cache_spec, []),
    (CPUWorker.initialize_from_config, ["kv_cache_config"]),
    (CPUWorker.execute_model, ["scheduler_output"]),
    (CPUAttentionMetadataBuilder.build, ["common_prefix_len", "common_attn_metadata", "fast_build"]),
    (FlashAttentionMetadataBuilder.build, ["common_prefix_len", "common_attn_metadata", "fast_build"]),
    (TritonAttentionMetadataBuilder.build, ["common_prefix_len", "common_attn_metadata", "fast_build"]),
    (Worker.get_kv_cache_spec, []),
    (Worker.initialize_from_config, ["kv_cache_config"]),
    (Worker.compile_or_warm_up_model, []),
    (Worker.execute_model, ["scheduler_output"]),
    (Worker.sample_tokens, ["grammar_output"]),
    (StagedWriteTensor.stage_write, ["index", "start", "x"]),
    (CPUAttentionBackendImpl.do_kv_cache_update, ["layer", "key", "value", "kv_cache", "slot_mapping"]),
]  # fmt: skip


def test_the_pinned_vllm_is_installed() -> None:
    assert vllm.__version__ == "0.32.0"


@pytest.mark.parametrize(("function", "parameters"), SURFACE, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures_are_the_ones_we_override_or_call(function: Callable[..., Any], parameters: list[str]) -> None:
    found = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    assert found == parameters


def test_blocks_are_removed_before_they_are_allocated_on_the_processed_token_basis() -> None:
    """The order in `allocate_slots` that compaction stands on: remove, then count, allocate and publish."""
    source = inspect.getsource(KVCacheManager.allocate_slots)
    steps = [
        "self.coordinator.remove_skipped_blocks(",
        "num_in_flight_tokens",
        ".allocate_new_blocks(",
        ".cache_blocks(",
    ]
    positions = [source.index(step) for step in steps]
    assert positions == sorted(positions)


def test_every_chunk_passes_where_we_shorten_it_and_every_block_where_we_publish_it_or_not() -> None:
    assert inspect.getsource(AsyncScheduler.schedule).count("self._reserve_prefill_lookahead(") == 2
    source = inspect.getsource(KVCacheManager)
    assert source.count(".cache_blocks(") == source.count("self.coordinator.cache_blocks(") == 2


@pytest.mark.parametrize(
    ("function", "steps"),
    [
        (
            V1ModelRunner.execute_model,
            ["self.synchronize_input_prep()", "self._update_states(", "self._build_attention_metadata("],
        ),
        (
            V2ModelRunner.execute_model,
            [
                "self.finish_requests(", "self.add_requests(", "self.update_requests(",
                "self.block_tables.apply_staged_writes()", "self.prepare_attn(",
            ],
        ),
    ],
    ids=["V1", "V2"],
)  # fmt: skip
def test_runners_read_block_tables_only_after_they_took_up_what_changed(
    function: Callable[..., Any], steps: list[str]
) -> None:
    """Our nulls are written before `execute_model`; the V1 runner's copy of the step before must be over by then."""
    source = inspect.getsource(function)
    positions = [source.index(step) for step in steps]
    assert positions == sorted(positions)
