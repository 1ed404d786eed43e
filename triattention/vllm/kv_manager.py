"""The KV-cache spec and manager: a full-attention group whose requests hold a bounded number of blocks.

The manager alone decides every compaction, in the call that vLLM makes before each allocation. It replaces dead
blocks by vLLM's null block, as `SlidingWindowManager` and `RSWAManager` do, and queues an order for the workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from triattention.bounds import blocks_bound, cdiv, most_live_tokens
from triattention.compaction import due_at, first_live_block
from triattention.config import CompressionConfig
from triattention.vllm.orders import CompactionOrder

if TYPE_CHECKING:
    from triattention.vllm.pool import Pool


@dataclass(frozen=True, kw_only=True)
class CompactedAttentionSpec(FullAttentionSpec):
    """Full attention whose KV cache is compacted to `compression.budget` tokens behind the pinned prompt."""

    compression: CompressionConfig = field(hash=False)  # vLLM hashes a group's spec in every step
    decode_in_flight_tokens: int
    """Most tokens of one decoding request that are scheduled but not processed."""
    chunk_in_flight_tokens: int
    """The same for a request that is prefilled in chunks."""

    @classmethod
    def from_full_attention(cls, spec: FullAttentionSpec, config: CompressionConfig, vllm_config: VllmConfig) -> Self:
        return cls(
            **{field.name: getattr(spec, field.name) for field in fields(spec)},
            compression=config,
            decode_in_flight_tokens=vllm_config.max_concurrent_batches,
            # Whole batches, whatever long_prefill_token_threshold is: vLLM sets it aside for a request that is alone.
            chunk_in_flight_tokens=vllm_config.max_in_flight_tokens,
        )

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """As `RSWASpec.merge`: the parent merges the common fields, ours must agree and are put back.

        Raises AssertionError where they cannot be one: so vLLM finds out which layers make a group.
        """
        assert all(isinstance(spec, cls) for spec in specs), "only some layers are compacted"
        first = specs[0]
        own = {name: getattr(first, name) for name in cls.__annotations__}
        assert all(own == {name: getattr(spec, name) for name in own} for spec in specs), "settings differ"
        base = FullAttentionSpec.merge([spec.plain() for spec in specs])
        return cls(**{field.name: getattr(base, field.name) for field in fields(base)}, **own)

    def plain(self) -> FullAttentionSpec:
        return FullAttentionSpec(**{field.name: getattr(self, field.name) for field in fields(FullAttentionSpec)})

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that a request of max_model_len with a prompt of one block can hold: what start-up must find free."""
        blocks = blocks_bound(
            prompt_tokens=1,
            total_tokens=vllm_config.model_config.max_model_len,
            block_size=self.block_size,
            config=self.compression,
            in_flight_tokens=self.chunk_in_flight_tokens,
        )
        return blocks * self.page_size_bytes


def compacted_specs(
    specs: Mapping[str, KVCacheSpec], config: CompressionConfig, vllm_config: VllmConfig
) -> dict[str, KVCacheSpec]:
    """A model's specs by layer name, those of full attention swapped for ours; sliding and linear layers stay.

    Raises ValueError, one sentence, for a kind of full attention that is not known, where there is none, and where
    vLLM is to treat other layers as full attention.
    """
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        for name, spec in specs.items():
            if isinstance(spec, SlidingWindowSpec | ChunkedLocalAttentionSpec):
                raise ValueError(
                    f"disable_hybrid_kv_cache_manager is True, but layer {name} is {type(spec).__name__} and would "
                    "share a block table with compressed layers: leave disable_hybrid_kv_cache_manager unset."
                )
    ours = dict(specs)
    for name, spec in specs.items():
        if type(spec) is FullAttentionSpec and spec.sliding_window is None:
            ours[name] = CompactedAttentionSpec.from_full_attention(spec, config, vllm_config)
        elif isinstance(spec, FullAttentionSpec):
            raise ValueError(
                f"KV compression does not support {type(spec).__name__} of layer {name}: serve this model "
                "without the triattention settings."
            )
    if not any(isinstance(spec, CompactedAttentionSpec) for spec in ours.values()):
        raise ValueError("KV compression found no full-attention layer in this model: serve it without.")
    return ours


class CompactedAttentionManager(FullAttentionManager):
    """Bounded block tables. Never writes to anything that others read or may hit; `Pool` publishes nothing inexact.

    Per request the table reads `[pinned prompt blocks] [null blocks] [live blocks]`.
    """

    def __init__(self, kv_cache_spec: CompactedAttentionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.config = kv_cache_spec.compression
        self.pool: Pool
        """What all groups have in common; it puts itself here when the scheduler makes it."""
        self.null_blocks: dict[str, int] = {}
        """Request id -> null blocks behind its pinned ones; absent until its first compaction."""
        self.due_at: dict[str, int] = {}
        """Request id -> processed tokens at which its next compaction is due: what every step asks of every request."""
        self.orders: list[CompactionOrder] = []
        self.compactions = 0
        self.freed_blocks = 0
        self.evicted_tokens = 0
        self.stranded_slots = 0

    def pinned_blocks(self, prompt_tokens: int) -> int:
        return cdiv(self.config.pinned_tokens(prompt_tokens), self.block_size)

    def held_blocks(self, request_id: str) -> int:
        return len(self.req_to_blocks.get(request_id, ())) - self.null_blocks.get(request_id, 0)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Compact the request if it is due: null its dead blocks, free them and queue the order."""
        if processed_computed_tokens < self.due_at.get(request_id, 0):
            return
        blocks = self.req_to_blocks.get(request_id)
        if not blocks or num_prompt_tokens is None:
            return  # first allocation: prefix-cache hits are counted as processed before they are attached
        pinned = self.pinned_blocks(num_prompt_tokens)
        start = pinned + self.null_blocks.get(request_id, 0)
        cut = first_live_block(processed_computed_tokens, start, self.block_size, self.config)
        if cut is None:
            self.due_at[request_id] = due_at(start, self.block_size, self.config)
            return
        end = cdiv(processed_computed_tokens, self.block_size)
        self.orders.append(
            CompactionOrder(
                request_id=request_id,
                group=self.kv_cache_group_id,
                processed_tokens=processed_computed_tokens,
                first_dead_block=start,
                first_live_block=cut,
                block_ids=tuple(block.block_id for block in blocks[start:end]),
                protected_blocks=tuple(i - start for i in range(cut, end) if blocks[i].ref_cnt > 1),
            )
        )
        for block in blocks[cut:end]:
            if block.ref_cnt == 1:
                # Holes in it are about to be filled: it no longer holds what its hash says.
                self.block_pool._maybe_evict_cached_block(block)
        free_before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, start, cut)
        self.null_blocks[request_id] = cut - pinned
        self.due_at[request_id] = due_at(cut, self.block_size, self.config)

        live_tokens = processed_computed_tokens - start * self.block_size
        kept_tokens = processed_computed_tokens - cut * self.block_size
        self.compactions += 1
        self.freed_blocks += self.block_pool.get_num_free_blocks() - free_before
        self.evicted_tokens += live_tokens - kept_tokens
        live_blocks = sum(not block.is_null for block in blocks[start:end])
        self.stranded_slots += (live_blocks - (end - cut)) * self.block_size

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.null_blocks.pop(request_id, None)
        self.due_at.pop(request_id, None)
        self.pool.promised_blocks = None
        return super().pop_blocks_for_free(request_id)

    def hit_limit(self, request: Request) -> int:
        """Most tokens that prefix-cache hits may bring at admission: more would be dead in the next step.

        Without it a request could start with more blocks than its bound, which admission counted on.
        """
        pinned = self.pinned_blocks(request.num_prompt_tokens)
        live = most_live_tokens(self.block_size, self.config)
        return (pinned + live // self.block_size) * self.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """At admission no more than the request's bound, or more than there are: then it waits, for others to grow.

        With `reserve_growth` off only the tokens it has now are counted, as vLLM does.
        """
        blocks = self.req_to_blocks.get(request_id)
        if blocks:
            # Every running request passes here in every step: as vLLM has it, without another call.
            return max(cdiv(num_tokens, self.block_size) - len(blocks), 0)
        if apply_admission_cap:
            request = self.pool.requests[request_id]
            if self.config.reserve_growth and not self.pool.fits(request, self, new_computed_blocks):
                return self.block_pool.num_gpu_blocks
            bound = self.pool.bound_in(self, request, resumed=request.num_preemptions > 0)
            num_tokens = min(num_tokens, bound * self.block_size)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )


def register_spec() -> None:
    """Make the spec known in this process. vLLM registers its own lazily, and only into an empty registry."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        CompactedAttentionSpec, CompactedAttentionManager, uniform_type_base_spec=FullAttentionSpec
    )


register_spec()
