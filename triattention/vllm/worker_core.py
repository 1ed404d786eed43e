"""What every compacting worker does, whatever the device: swaps the compacted KV-cache spec in, and carries out
compaction orders before each step.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, UniformTypeKVCacheSpecs
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from triattention.kernels import PagedCache
from triattention.policies import create_policy
from triattention.vllm.attention import SqueezingBuilder, override_backend
from triattention.vllm.block_tables import mirror_of
from triattention.vllm.compactor import Compactor, policy_context
from triattention.vllm.kv_manager import CompactedAttentionSpec, compacted_specs
from triattention.vllm.orders import CompactionOrder, orders_of
from triattention.vllm.scheduler import CompactionScheduler
from triattention.vllm.self_calibration import with_statistics
from triattention.vllm.support import check_policy, check_supported, compression_config
from triattention.vllm.timing import Stopwatch, TimedOutput, with_times


class CompactingWorker(Worker):
    """Mixed in before a platform's own worker, which is a `Worker` too."""

    backends: ClassVar[dict[AttentionBackendEnum, type[AttentionBackend]]]
    """The attention backends that the platform's worker may choose, with our metadata builders in them."""

    def __init__(self, vllm_config: VllmConfig, local_rank: int, *args: Any, **kwargs: Any) -> None:
        check_supported(vllm_config)
        config = compression_config(vllm_config)
        if config is None:
            raise ValueError(
                "worker_cls is triattention.vllm.worker.CompactionWorker but additional_config holds no "
                '"triattention" settings: add them, or leave worker_cls unset.'
            )
        if not issubclass(vllm_config.scheduler_config.get_scheduler_cls(), CompactionScheduler):
            raise ValueError(
                "KV compression needs the scheduler that gives its orders: set scheduler_cls to "
                "triattention.vllm.scheduler.CompactionScheduler."
            )
        self.compression = with_statistics(config, vllm_config, local_rank)
        check_policy(self.compression, vllm_config)
        self.compactors: dict[int, Compactor] = {}
        self.compacted_requests: set[str] = set()
        """Running requests whose rows hold null blocks."""
        self.timed: list[tuple[Stopwatch, int]] = []
        """Compactions since the last output: a watch, and how many it has seen."""
        for backend, ours in self.backends.items():
            override_backend(backend, ours)
        super().__init__(vllm_config, local_rank, *args, **kwargs)

    @abstractmethod
    def caches_of(self, layers: Sequence[Attention]) -> tuple[PagedCache, PagedCache]:
        """The layers' keys and values. Raises ValueError for a layout that is not known."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Full-attention layers get the compacted spec; sliding-window and linear layers stay as they are."""
        return compacted_specs(super().get_kv_cache_spec(), self.compression, self.vllm_config)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self.block_tables = mirror_of(self.model_runner)
        layers: dict[str, Attention] = self.vllm_config.compilation_config.static_forward_context
        for group, cache_group in enumerate(kv_cache_config.kv_cache_groups):
            spec = cache_group.kv_cache_spec
            if isinstance(spec, UniformTypeKVCacheSpecs) and any(
                isinstance(layer, CompactedAttentionSpec) for layer in spec.kv_cache_specs.values()
            ):
                sizes = sorted({layer.page_size_bytes for layer in spec.kv_cache_specs.values()})
                raise ValueError(
                    "KV compression needs pages of one size, but this model's full-attention layers have pages of "
                    f"{' and '.join(map(str, sizes))} bytes: serve it without the triattention settings."
                )
            if not isinstance(spec, CompactedAttentionSpec):
                continue
            self._share_with_builders(group, spec)
            keys, values = self.caches_of([layers[name] for name in cache_group.layer_names])
            policy = create_policy(self.compression, policy_context(spec, cache_group.layer_names, self.vllm_config))
            self.compactors[group] = Compactor(self.compression, keys, values, policy)

    def _share_with_builders(self, group: int, spec: CompactedAttentionSpec) -> None:
        for attention in self.model_runner.attn_groups[group]:
            for builder in attention.metadata_builders:
                if not isinstance(builder, SqueezingBuilder):
                    raise ValueError(
                        f"KV compression does not know the attention backend {attention.backend.get_name()}: set "
                        f"attention_backend to {' or '.join(backend.name for backend in self.backends)}."
                    )
                if builder.kv_cache_spec.block_size != spec.block_size or attention.kernel_block_size is not None:
                    raise ValueError(
                        f"KV compression needs kernel blocks as large as KV blocks: set block_size to "
                        f"{builder.kv_cache_spec.block_size} instead of {spec.block_size}."
                    )
                builder.compacted_requests = self.compacted_requests

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        dropped = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        self.compacted_requests -= dropped
        for compactor in self.compactors.values():
            if compactor.quota is not None:
                compactor.quota.forget(scheduler_output.finished_req_ids)
        orders = orders_of(scheduler_output)
        if orders:
            self._carry_out(orders)
            for order in orders:
                # One that was preempted after its order comes back with a table of its own.
                if order.request_id not in dropped:
                    self.block_tables.null(order)
                    self.compacted_requests.add(order.request_id)
        return self._timed(super().execute_model(scheduler_output))

    @torch.inference_mode()
    def _carry_out(self, orders: Sequence[CompactionOrder]) -> None:
        by_group: defaultdict[int, list[CompactionOrder]] = defaultdict(list)
        for order in orders:
            by_group[order.group].append(order)
        watch = Stopwatch(self.device)
        for group, own in by_group.items():
            self.compactors[group].carry_out(own)
        watch.stop()
        self.timed.append((watch, len(orders)))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().sample_tokens(*args, **kwargs))

    def _timed(self, output: Any) -> Any:
        """Send the compactions' times along with the step's result, whichever call returns it.

        A step that computes nothing has none of its own: vLLM returns one object for all of them, so they wait.
        """
        if not self.timed or output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
            return output
        timed, self.timed = self.timed, []
        if isinstance(output, AsyncModelRunnerOutput):
            return TimedOutput(output, timed)
        assert isinstance(output, ModelRunnerOutput), "pipeline parallelism is refused at start"
        return with_times(output, timed)
