"""Score, plan and compact in plain torch, squeeze in numpy: the CPU's path, and what the Triton kernels are compared
with."""

import numpy as np
import torch
from torch import Tensor

from triattention.kernels.vocabulary import HoleFills, LiveRegions, PagedCache, QueryWeights
from triattention.selection import select

# Keys that are widened to fp32 at a time.
_NUMBERS_BYTES = 4 << 20

# By size, not by kind: copies are bit-exact and fp8 has no indexing of its own.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def raw_scores(keys: PagedCache, weights: QueryWeights, regions: LiveRegions, layers: range) -> Tensor:
    """S of each query head, fp32 [layers, kv_heads, group, tokens of all requests]."""
    rotations = weights.rotations([r.position for r in regions.regions]).to(torch.complex64).to(keys.device)
    heads, dim, size, group = keys.kv_heads, keys.head_dim, regions.block_size, weights.group
    scores = torch.empty((len(layers), heads, group, regions.tokens), dtype=torch.float32, device=keys.device)
    for request, region in enumerate(regions.regions):
        block_ids = regions.blocks_of(request)
        blocks = len(block_ids)
        turned = as_heads(weights.means * rotations[request], weights)
        # As many layers at a time as stay in the cache.
        step = max(1, _NUMBERS_BYTES // (4 * heads * blocks * size * dim))
        for first in range(layers.start, layers.stop, step):
            some = slice(first, min(first + step, layers.stop))
            tokens = keys.read(some, block_ids).float().reshape(-1, blocks, heads, size, dim)
            if tokens.stride(-1) == 1:
                # Rows, which cost little to copy: a head's in one, so that it takes one product.
                tokens = tokens.transpose(1, 2).reshape(-1, 1, heads, blocks * size, dim)
            real, imag = split(tokens, weights)
            magnitude = real.square().addcmul_(imag, imag).sqrt_()
            # Products with the tokens last, as `vec` keys lie: [layers, 1 or blocks, kv_heads, group, tokens].
            part = turned[some, None] @ tokens.transpose(-1, -2)
            part += weights.spread[some, None] @ magnitude.transpose(-1, -2)
            rows = slice(first - layers.start, some.stop - layers.start)
            flat = part.permute(0, 2, 3, 1, 4).flatten(3)
            scores[rows, :, :, regions.token_slice(request)] = flat[..., : region.tokens]
    return scores


def score(keys: PagedCache, weights: QueryWeights, regions: LiveRegions) -> Tensor:
    raw = raw_scores(keys, weights, regions, range(len(keys.layers)))
    parts = [standardise(raw[..., regions.token_slice(request)]).amax(dim=2) for request in range(len(regions))]
    return torch.cat(parts, dim=-1)


def plan(scores: Tensor, regions: LiveRegions, window: int, shared: bool) -> HoleFills:
    if shared:
        scores = scores.mean(dim=0, keepdim=True)
    source = torch.empty((*scores.shape[:2], regions.fills), dtype=torch.int32, device=scores.device)
    target = torch.empty_like(source)
    for request, region in enumerate(regions.regions):
        fills = regions.fill_slice(request)
        kept = select(
            scores[..., regions.token_slice(request)], region.tokens - region.dead_slots, window, "per_layer_per_head"
        )
        source[..., fills] = _slots(kept[..., : region.dead_slots], region.dead_slots)
        target[..., fills] = _slots(~kept[..., region.dead_slots :], region.dead_slots, region.dead_slots)
    return HoleFills(source, target)


def compact(keys: PagedCache, values: PagedCache, regions: LiveRegions, fills: HoleFills) -> None:
    size = regions.block_size
    first_block = regions.requests[:, 2].repeat_interleave(regions.requests[:, 4])
    layer, head, at = (fills.source >= 0).nonzero(as_tuple=True)
    from_slot, to_slot = fills.source[layer, head, at], fills.target[layer, head, at]
    from_block = regions.block_ids[first_block[at] + from_slot // size]
    to_block = regions.block_ids[first_block[at] + to_slot // size]
    from_slot, to_slot = from_slot % size, to_slot % size
    if fills.source.shape[0] == 1:  # shared sets: the same copies in all layers
        layer = torch.arange(len(keys.layers), device=keys.device)[:, None]
    for cache in (keys, values):
        t2 = cache.layers[0].shape[3]
        source = (from_block, head, *_inside(from_slot, t2))
        target = (to_block, head, *_inside(to_slot, t2))
        integers = _INTEGERS[cache.dtype.itemsize]
        if cache.all_layers is not None:
            numbers = cache.all_layers.view(integers)
            numbers[layer, *target] = numbers[layer, *source]
            continue
        for index, view in enumerate(cache.layers):
            numbers = view.view(integers)
            mine = slice(None) if layer.ndim > 1 else layer == index
            to, of = ([part if isinstance(part, int) else part[mine] for part in at] for at in (target, source))
            numbers[*to] = numbers[*of]


def _inside(slot: Tensor, t2: int) -> tuple[Tensor, Tensor | int]:
    """Where in a block of [t1, t2] tokens a slot stands. Most layouts are plain there, and small operations count."""
    return (slot, 0) if t2 == 1 else (slot // t2, slot % t2)


def squeeze(block_table: Tensor, lengths: Tensor, block_size: int, squeezed: Tensor, live_lengths: Tensor) -> None:
    # numpy, whose small operations cost half of torch's. Their number is what this costs, in every step in which a
    # request is compacted.
    table, tokens = block_table.numpy(), lengths.numpy()
    blocks = -(-tokens // block_size)
    used = max(1, blocks.max())
    table = table[:, :used]
    null = table == 0
    null &= np.arange(used) < blocks[:, None]
    count = np.count_nonzero(null, axis=1)
    count[count == blocks] = 0
    column = np.arange((blocks - count).max())
    source = column + (column >= null.argmax(axis=1)[:, None]) * count[:, None]
    np.minimum(source, used - 1, out=source)
    squeezed.numpy()[:, : len(column)] = table[np.arange(len(table))[:, None], source]
    live_lengths.numpy()[:] = tokens - count * block_size


def standardise(scores: Tensor) -> Tensor:
    """z-scores over the last axis (population deviation); zeros for equal scores. Returns a copy."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt_()
    # Equal scores are not quite equal to their rounded mean: what is left is no deviation.
    rounding = 4 * torch.finfo(scores.dtype).eps * scores.abs().amax(dim=-1, keepdim=True)
    return centred.div_(deviation).masked_fill_(deviation <= rounding, 0)


def split(heads: Tensor, weights: QueryWeights) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts, each [..., bands], of heads [..., head_dim]; as `RopeParameters.split`."""
    if weights.interleaved:
        return heads[..., 0::2], heads[..., 1::2]
    if weights.rotary_dim == heads.shape[-1]:
        return heads[..., : weights.bands], heads[..., weights.bands :]
    half, tail = weights.rotary_dim // 2, weights.bands - weights.rotary_dim // 2
    a, b, c, d = heads.split((half, half, tail, tail), dim=-1)
    return torch.cat((a, c), dim=-1), torch.cat((b, d), dim=-1)


def as_heads(bands: Tensor, weights: QueryWeights) -> Tensor:
    """Inverse of `split`, of complex bands [..., bands]: heads [..., head_dim]."""
    if weights.interleaved:
        return torch.view_as_real(bands).flatten(-2)
    half = weights.rotary_dim // 2
    front, tail = bands[..., :half], bands[..., half:]
    return torch.cat((front.real, front.imag, tail.real, tail.imag), dim=-1)


def _slots(mask: Tensor, capacity: int, first: int = 0) -> Tensor:
    """Indices, from `first` on, of True along the last axis, at the front; then -1: int32 [..., capacity]."""
    # A spare column takes what is not True.
    slots = torch.full((*mask.shape[:-1], capacity + 1), -1, dtype=torch.int32, device=mask.device)
    place = torch.where(mask, mask.cumsum(dim=-1) - 1, capacity)
    numbers = torch.arange(first, first + mask.shape[-1], dtype=torch.int32, device=mask.device)
    slots.scatter_(-1, place, numbers.expand(mask.shape))
    return slots[..., :capacity]
