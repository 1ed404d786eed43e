"""Carries out compaction orders on one KV-cache group: score the live keys, plan, fill holes in every layer.

Scores, plan and copies are calls of `triattention.kernels`, which run where the cache lies: no loop here is over heads,
layers or tokens, and none waits for a GPU. (A segment quota does: it is torch alone.)
"""

from collections.abc import Iterator, Sequence

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from triattention import kernels
from triattention.bounds import cdiv
from triattention.config import CompressionConfig
from triattention.kernels import LiveRegion, LiveRegions, PagedCache
from triattention.policies import Policy, PolicyContext
from triattention.rope import RopeParameters
from triattention.segments import SegmentQuota
from triattention.vllm.kv_manager import CompactedAttentionSpec
from triattention.vllm.orders import CompactionOrder


class Compactor:
    def __init__(self, config: CompressionConfig, keys: PagedCache, values: PagedCache, policy: Policy) -> None:
        self.config = config
        self.keys = keys
        self.values = values
        self.policy = policy
        self.weights = policy.query_weights(keys.device)
        self.quota = SegmentQuota(config) if config.segments > 1 else None

    def carry_out(self, orders: Sequence[CompactionOrder]) -> None:
        """Fill the holes of surviving blocks with the survivors of dying ones, as if one order after the other."""
        for batch in independent(orders):
            size = self.keys.block_size
            regions = LiveRegions([live_region(order, size) for order in batch], size, self.keys.device)
            scores = self._scores(regions)
            for request, order in enumerate(batch):
                self._steer(scores[..., regions.token_slice(request)], order)
            fills = kernels.plan(scores, regions, self.config.window, self.config.selection == "per_head")
            kernels.compact(self.keys, self.values, regions, fills)
            if self.quota is not None:
                for request, order in enumerate(batch):
                    mine = regions.fill_slice(request)
                    self.quota.moved(order.request_id, fills.source[..., mine], fills.target[..., mine])

    def warm_up(self) -> None:
        """Compile all that an order launches, by one of the usual size that reads and writes the null block alone.

        Whatever stands there nobody attends to.
        """
        size = self.keys.block_size
        dead, live = cdiv(self.config.interval, size), cdiv(self.config.budget, size)
        order = CompactionOrder(
            request_id="warm-up",
            group=0,
            processed_tokens=(dead + live) * size,
            first_dead_block=0,
            first_live_block=dead,
            block_ids=(0,) * (dead + live),
        )
        self.carry_out([order])
        if self.quota is not None:
            self.quota.forget([order.request_id])

    def _steer(self, scores: torch.Tensor, order: CompactionOrder) -> None:
        """One request's scores [layers, kv_heads, tokens]: what must stay at inf; with a quota, what goes at -inf."""
        if not order.protected_blocks and self.quota is None:
            return
        size = self.keys.block_size
        protected = torch.zeros(scores.shape[-1], dtype=torch.bool)
        for block in order.protected_blocks:
            protected[block * size : (block + 1) * size] = True
        protected = protected.to(scores.device)
        # A policy's own inf must not tie with it, nor must the mean over layers reach it.
        scores.clamp_(max=torch.finfo(scores.dtype).max / (2 * len(scores)))
        scores.masked_fill_(protected, torch.inf)
        if self.quota is not None:
            dead_slots = (order.first_live_block - order.first_dead_block) * size
            scores.copy_(
                self.quota.spread(order.request_id, order.first_dead_block * size, scores, protected, dead_slots)
            )

    def _scores(self, regions: LiveRegions) -> torch.Tensor:
        """fp32 [layers, kv_heads, tokens of all requests]."""
        if self.weights is not None:
            return kernels.score(self.keys, self.weights, regions)
        scores = [
            self.policy.score(self.keys.gather(regions.blocks_of(request), region.tokens), region.position)
            for request, region in enumerate(regions.regions)
        ]
        return torch.cat(scores, dim=-1)


def live_region(order: CompactionOrder, block_size: int) -> LiveRegion:
    return LiveRegion(
        block_ids=order.block_ids,
        tokens=order.processed_tokens - order.first_dead_block * block_size,
        dead_slots=(order.first_live_block - order.first_dead_block) * block_size,
        position=order.processed_tokens,
    )


def independent(orders: Sequence[CompactionOrder]) -> Iterator[list[CompactionOrder]]:
    """Runs of orders that may be carried out at once: none writes into a block that an earlier one reads.

    A block that dies for one request can be a live one of another that shares it, and the latter's alone from then on.
    """
    batch: list[CompactionOrder] = []
    dying: set[int] = set()
    for order in orders:
        dead = order.first_live_block - order.first_dead_block
        if not dying.isdisjoint(order.block_ids[dead:]):
            yield batch
            batch, dying = [], set()
        batch.append(order)
        dying.update(order.block_ids[:dead])
    if batch:
        yield batch


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
