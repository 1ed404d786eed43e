"""Score, plan and compact paged KV caches, on whatever device they lie: Triton on a GPU, torch and numpy on a CPU.

    scores = score(keys, weights, regions)
    fills = plan(scores, regions, window, shared)
    compact(keys, values, regions, fills)

One call does all layers of all requests of a step; on a GPU none of them waits for the device. `squeeze` is for the
attention of every step that follows.
"""

from types import ModuleType

from torch import Tensor

from triattention.kernels import with_torch
from triattention.kernels.vocabulary import HoleFills, LiveRegion, LiveRegions, PagedCache, QueryWeights

__all__ = [
    "HoleFills",
    "LiveRegion",
    "LiveRegions",
    "PagedCache",
    "QueryWeights",
    "compact",
    "plan",
    "raw_scores",
    "score",
    "squeeze",
]


def score(keys: PagedCache, weights: QueryWeights, regions: LiveRegions) -> Tensor:
    """TriAttention scores of the live tokens, fp32 [layers, kv_heads, tokens of all requests].

    Each query head's z-scores over its request's tokens, then the group's maximum. `regions.token_slice(r)` is request
    r's part. `keys` may be of any float dtype; scales of quantised caches cancel in the z-scores.
    """
    return _path(keys.device.type).score(keys, weights, regions)


def raw_scores(keys: PagedCache, weights: QueryWeights, regions: LiveRegions, layers: range) -> Tensor:
    """Before z-scores and maximum: fp32 [layers, kv_heads, group, tokens of all requests], of some layers."""
    return _path(keys.device.type).raw_scores(keys, weights, regions, layers)


def plan(scores: Tensor, regions: LiveRegions, window: int, shared: bool) -> HoleFills:
    """Which survivors move where, for scores of `score`'s shape; higher means keep, NaN counts as the lowest.

    Keeps what `triattention.selection.select` keeps: the last `window` slots of each request, and the best before
    them, equal scores to the lower slot, so that exactly its `dead_slots` go. `shared`: one set per head for all
    layers, of the mean over layers (`per_head`); else one per layer and head (`per_layer_per_head`).
    """
    for region in regions.regions:
        keep = region.tokens - region.dead_slots
        assert window <= keep, f"window {window} <= kept {keep} must hold"
    return _path(scores.device.type).plan(scores, regions, window, shared)


def compact(keys: PagedCache, values: PagedCache, regions: LiveRegions, fills: HoleFills) -> None:
    """Copies every survivor in a dying block into a hole of a live block: keys and values, all layers, bit for bit.

    Sources stand in dying blocks and targets in live ones, so no copy depends on another.
    """
    _path(keys.device.type).compact(keys, values, regions, fills)


def squeeze(block_table: Tensor, lengths: Tensor, block_size: int, squeezed: Tensor, live_lengths: Tensor) -> None:
    """Rows of a block table without their null blocks (id 0), and the tokens that are left.

    block_table int32 [requests, max_blocks], lengths int32 [requests] (tokens) are read; squeezed and live_lengths, of
    the same shapes and dtypes, are written; what stands in a row behind its live blocks is undefined. A block is null
    only left of `ceil(length / block_size)`; a row's unused tail may hold anything. A row's null blocks are one run:

        block size 4, length 18     5 0 0 7 8 | 0      ->  5 7 8, length 10

    A row of null blocks alone stays as it is: requests have a last block, vLLM's dummy steps (warm-up, capture of CUDA
    graphs, idle data-parallel ranks) have none, and attention takes no negative lengths.
    """
    _path(block_table.device.type).squeeze(block_table, lengths, block_size, squeezed, live_lengths)


def _path(device: str) -> ModuleType:
    if device == "cuda":
        from triattention.kernels import with_triton

        return with_triton
    return with_torch
