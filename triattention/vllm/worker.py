"""The worker: swaps the compacted KV-cache spec in, and carries out compaction orders before each step."""

import time
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from triattention.compaction import hole_fills
from triattention.config import CompressionConfig
from triattention.policies import PolicyContext, create_policy
from triattention.rope import RopeParameters
from triattention.segments import SegmentQuota
from triattention.selection import select
from triattention.vllm.kv_manager import CompactedAttentionSpec
from triattention.vllm.layout import PagedTokens, detect_layout, split_cpu_cache
from triattention.vllm.orders import CompactionOrder, attach_seconds, orders_of
from triattention.vllm.support import check_supported, compression_config


class Compactor:
    """Carries out orders on one KV-cache group: score the live keys, select, fill holes in every layer."""

    def __init__(
        self,
        config: CompressionConfig,
        spec: CompactedAttentionSpec,
        layer_names: list[str],
        layers: dict[str, Attention],
        vllm_config: VllmConfig,
    ) -> None:
        self.config = config
        self.block_size = spec.block_size
        self.keys: list[PagedTokens] = []
        self.values: list[PagedTokens] = []
        for name in layer_names:
            layer = layers[name]
            layout = detect_layout(layer, layer.kv_cache)
            keys, values = split_cpu_cache(layer.kv_cache)
            self.keys.append(PagedTokens(layout.keys(keys)))
            self.values.append(PagedTokens(layout.values(values)))
        self.policy = create_policy(config, policy_context(spec, layer_names, vllm_config))
        self.quota = SegmentQuota(config) if config.segments > 1 else None

    def carry_out(self, order: CompactionOrder) -> None:
        """Fill the holes of the surviving blocks with the survivors of the dying ones, in all layers."""
        block_ids = torch.tensor(order.block_ids)
        tokens = order.processed_tokens - order.first_dead_block * self.block_size
        dead_slots = (order.first_live_block - order.first_dead_block) * self.block_size
        keys = torch.stack([layer.gather(block_ids)[:, :tokens] for layer in self.keys])
        scores = self.policy.score(keys, order.processed_tokens)
        protected = torch.zeros(tokens, dtype=torch.bool)
        for block in order.protected_blocks:
            protected[block * self.block_size : (block + 1) * self.block_size] = True
        scores[..., protected] = torch.inf
        if self.quota is not None:
            first_slot = order.first_dead_block * self.block_size
            scores = self.quota.spread(order.request_id, first_slot, scores, protected, dead_slots)
        kept = select(scores, tokens - dead_slots, self.config.window, self.config.selection)
        moves = hole_fills(kept, dead_slots)
        if self.quota is not None:
            self.quota.moved(order.request_id, moves, dead_slots)
        # Moves are sorted by layer, so each layer's are one slice.
        ends = torch.bincount(moves.layer, minlength=len(self.keys)).cumsum(0).tolist()
        for layer, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            rows = slice(start, end)
            head, source, target = moves.head[rows], moves.source[rows], moves.target[rows]
            self.keys[layer].copy(block_ids, head, source, target)
            self.values[layer].copy(block_ids, head, source, target)


def policy_context(spec: CompactedAttentionSpec, layer_names: list[str], vllm_config: VllmConfig) -> PolicyContext:
    """What a policy may know of the model and of this rank's share of its heads."""
    model = vllm_config.model_config
    total_kv_heads = model.get_total_num_kv_heads()
    # Heads are split over the ranks in order; with fewer heads than ranks each is replicated.
    first = get_tensor_model_parallel_rank() * total_kv_heads // vllm_config.parallel_config.tensor_parallel_size
    return PolicyContext(
        layers=tuple(extract_layer_index(name) for name in layer_names),
        kv_heads=range(first, first + spec.num_kv_heads),
        total_kv_heads=total_kv_heads,
        q_heads=model.hf_text_config.num_attention_heads,
        head_dim=spec.head_size,
        rope=RopeParameters.from_config(model.hf_text_config),
        model_config=model.hf_text_config,
    )


class CompactionWorker(CPUWorker):
    """`CPUWorker` on the V1 model runner, with compaction."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        check_supported(vllm_config)
        config = compression_config(vllm_config)
        if config is None:
            raise ValueError(
                "worker_cls is triattention.vllm.worker.CompactionWorker but additional_config holds no "
                '"triattention" settings: add them, or leave worker_cls unset.'
            )
        self.compression = config
        self.compactors: dict[int, Compactor] = {}
        self.seconds: list[float] = []
        register_backend(AttentionBackendEnum.CPU_ATTN, "triattention.vllm.attention.CompactedCPUAttentionBackend")
        super().__init__(vllm_config, *args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Full-attention layers get the compacted spec; sliding-window and linear layers stay as they are."""
        specs = super().get_kv_cache_spec()
        for name, spec in specs.items():
            if type(spec) is FullAttentionSpec and spec.sliding_window is None:
                specs[name] = CompactedAttentionSpec.from_full_attention(spec, self.compression, self.vllm_config)
            elif isinstance(spec, FullAttentionSpec):
                raise ValueError(
                    f"KV compression does not support {type(spec).__name__} of layer {name}: serve this model "
                    "without the triattention settings."
                )
        if not any(isinstance(spec, CompactedAttentionSpec) for spec in specs.values()):
            raise ValueError("KV compression found no full-attention layer in this model: serve it without.")
        return specs

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        layers: dict[str, Attention] = self.vllm_config.compilation_config.static_forward_context
        runner = self.model_runner
        for group, cache_group in enumerate(kv_cache_config.kv_cache_groups):
            spec = cache_group.kv_cache_spec
            if not isinstance(spec, CompactedAttentionSpec):
                continue
            if runner.input_batch.block_table[group].block_size != spec.block_size:
                raise ValueError(
                    f"KV compression needs kernel blocks as large as KV blocks: set block_size to "
                    f"{runner.input_batch.block_table[group].block_size} instead of {spec.block_size}."
                )
            self.compactors[group] = Compactor(
                self.compression, spec, cache_group.layer_names, layers, self.vllm_config
            )

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        for compactor in self.compactors.values():
            if compactor.quota is not None:
                compactor.quota.forget(scheduler_output.finished_req_ids)
        for order in orders_of(scheduler_output):
            start = time.perf_counter()
            self.compactors[order.group].carry_out(order)
            self._null_dead_blocks(order)
            self.seconds.append(time.perf_counter() - start)
        return self._timed(super().execute_model(scheduler_output))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().sample_tokens(*args, **kwargs))

    def _timed(self, output: Any) -> Any:
        """Send the compactions' times along with the step's result, whichever call returns it."""
        if self.seconds and type(output) is ModelRunnerOutput:
            attach_seconds(output, self.seconds)
            self.seconds = []
        return output

    def _null_dead_blocks(self, order: CompactionOrder) -> None:
        """Mirror in the worker's own tables what the manager did in the scheduler's."""
        runner = self.model_runner
        request = runner.requests.get(order.request_id)
        if request is None:
            return  # preempted and its state dropped in the meantime: it comes back with a table of its own
        dead = slice(order.first_dead_block, order.first_live_block)
        request.block_ids[order.group][dead] = [0] * (dead.stop - dead.start)
        row = runner.input_batch.req_id_to_index.get(order.request_id)
        if row is not None:
            runner.input_batch.block_table[order.group].block_table.np[row, dead] = 0
