# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
"""Score, plan and compact as Triton kernels, for NVIDIA GPUs from Hopper on. Same results as `with_torch`.

Where the time goes, for one request of 2,176 tokens of Qwen3-8B (36 layers, 8 KV heads, 128 bf16 numbers): 160 MB of
keys are read, 10 MB of raw scores written and read again, at most 19 MB of survivors copied. All of it is bound by
memory, if only the arithmetic keeps out of the way; so products run on the tensor cores and loads are pipelined.

Tensor cores multiply bf16. Numbers that do not fit are cut into several bf16 that add up to them: the products are
exact and sum up in fp32, so nothing is lost against fp32 arithmetic but 2^-17 of the magnitudes of 16-bit keys.

(Functions under `triton.jit` are Triton, not Python: they carry no types.)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention.kernels.vocabulary import HoleFills, LiveRegions, PagedCache, QueryWeights, to_device

# Raw scores are made and standardised for a few layers at a time, so that they stay in the L2 cache in between and
# take little memory beside vLLM's.
_RAW_BYTES = 32 << 20

# Scores that a program of the small kernels holds in registers at a time.
_SCORES_AT_ONCE = 8192
_RANKS_AT_ONCE = 4096
_FILL_TILE = 32

_FLOATS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
# How many bf16 make up one number of the cache exactly.
_TERMS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 1}
_INTEGERS = {1: tl.uint8, 2: tl.int16, 4: tl.int32}


@dataclass(frozen=True)
class Tiling:
    """How the keys are cut up: a program reads up to `tiles` tiles of `tile` tokens of one layer and KV head.

    `stages`: of the loop over the tiles. Block ids are loaded two stages before the keys they lead to, so 2 n + 1
    stages hold n tiles, n - 1 of them on their way while one is computed with.
    """

    tile: int = 64
    tiles: int = 4
    stages: int = 5
    warps: int = 4


TILING = Tiling()


def raw_scores(
    keys: PagedCache, weights: QueryWeights, regions: LiveRegions, layers: range, tiling: Tiling = TILING
) -> Tensor:
    """S of each query head, fp32 [layers, kv_heads, group, tokens of all requests]."""
    prepared = _Prepared(keys, weights, regions, tiling)
    raw = torch.empty(
        (len(layers), keys.kv_heads, weights.group, regions.tokens), dtype=torch.float32, device=keys.device
    )
    prepared.launch(raw, layers.start)
    return raw


def score(keys: PagedCache, weights: QueryWeights, regions: LiveRegions, tiling: Tiling = TILING) -> Tensor:
    layers, kv_heads, group = len(keys.layers), keys.kv_heads, weights.group
    scores = torch.empty((layers, kv_heads, regions.tokens), dtype=torch.float32, device=keys.device)
    prepared = _Prepared(keys, weights, regions, tiling)
    step = min(layers, max(1, _RAW_BYTES // (4 * kv_heads * group * regions.tokens)))
    raw = torch.empty((step, kv_heads, group, regions.tokens), dtype=torch.float32, device=keys.device)
    padded_group = triton.next_power_of_2(group)
    for first in range(0, layers, step):
        count = min(step, layers - first)
        prepared.launch(raw[:count], first)
        _standardise_kernel[(kv_heads * len(regions), count)](
            raw,
            scores[first:],
            regions.requests,
            regions.tokens,
            KV_HEADS=kv_heads,
            GROUP=group,
            PADDED_GROUP=padded_group,
            BLOCK=_SCORES_AT_ONCE // padded_group,
            num_warps=8,
        )
    return scores


def plan(scores: Tensor, regions: LiveRegions, window: int, shared: bool) -> HoleFills:
    if shared:
        scores = scores.mean(dim=0, keepdim=True)
    scores = scores.contiguous()
    source = torch.empty((*scores.shape[:2], regions.fills), dtype=torch.int32, device=scores.device)
    target = torch.empty_like(source)
    _plan_kernel[(scores.shape[0] * scores.shape[1], len(regions))](
        scores,
        source,
        target,
        regions.requests,
        window,
        regions.tokens,
        regions.fills,
        BLOCK=_RANKS_AT_ONCE,
        num_warps=8,
    )
    return HoleFills(source, target)


def compact(keys: PagedCache, values: PagedCache, regions: LiveRegions, fills: HoleFills) -> None:
    assert keys.is_plain, "keys and values of GPU backends lie in plain rows"
    assert values.is_plain, "keys and values of GPU backends lie in plain rows"
    assert (keys.dtype, keys.head_dim) == (values.dtype, values.head_dim), "keys and values differ in kind"
    if regions.fills == 0:
        return
    tiles = _tiles(regions.first_fill, _FILL_TILE, keys.device)
    _compact_kernel[(len(tiles) * keys.kv_heads, len(keys.layers))](
        keys.addresses,
        values.addresses,
        *_strides(keys),
        *_strides(values),
        regions.block_ids,
        regions.requests,
        tiles,
        fills.source,
        fills.target,
        regions.fills,
        fills.source.stride(0) if fills.source.shape[0] > 1 else 0,
        ALIGNMENT=math.gcd(keys.alignment, values.alignment),
        DTYPE=_INTEGERS[keys.dtype.itemsize],
        KV_HEADS=keys.kv_heads,
        BLOCK_SIZE=regions.block_size,
        HEAD_DIM=keys.head_dim,
        PADDED_DIM=triton.next_power_of_2(keys.head_dim),
        TILE=_FILL_TILE,
        num_warps=4,
    )


class _Prepared:
    """What every launch of the scoring kernel over some regions shares."""

    def __init__(self, keys: PagedCache, weights: QueryWeights, regions: LiveRegions, tiling: Tiling) -> None:
        assert keys.is_plain, "keys of GPU backends lie in plain rows"
        self.keys, self.weights, self.regions, self.tiling = keys, weights, regions, tiling
        rotations = torch.view_as_real(weights.rotations([r.position for r in regions.regions]))
        rotations = rotations.transpose(1, 2).float().contiguous()
        if keys.device.type == "cuda":
            rotations = rotations.pin_memory().to(keys.device, non_blocking=True)
        self.rotations = rotations
        self.tiles = _tiles(regions.first_token, tiling.tile * tiling.tiles, keys.device)

    def launch(self, raw: Tensor, first_layer: int) -> None:
        """Raw scores of the layers from `first_layer` on, into [layers, kv_heads, group, tokens]."""
        keys, weights = self.keys, self.weights
        padded_group = triton.next_power_of_2(weights.group)
        _raw_scores_kernel[(len(self.tiles) * keys.kv_heads, raw.shape[0])](
            keys.addresses,
            *_strides(keys),
            self.regions.block_ids,
            self.regions.requests,
            self.tiles,
            self.rotations,
            weights.mean_real,
            weights.mean_imag,
            weights.spread,
            raw,
            self.regions.tokens,
            first_layer,
            ALIGNMENT=keys.alignment,
            DTYPE=_FLOATS[keys.dtype],
            TERMS=_TERMS[keys.dtype],
            MAGNITUDE_TERMS=3 if keys.dtype == torch.float32 else 2,
            KV_HEADS=keys.kv_heads,
            GROUP=weights.group,
            PADDED_GROUP=padded_group,
            COLUMNS=max(16, triton.next_power_of_2(3 * padded_group)),
            BLOCK_SIZE=self.regions.block_size,
            BANDS=weights.bands,
            PADDED_BANDS=max(16, triton.next_power_of_2(weights.bands)),
            ROTARY_BANDS=weights.rotary_dim // 2,
            INTERLEAVED=weights.interleaved,
            TILE=self.tiling.tile,
            TILES=self.tiling.tiles,
            STAGES=self.tiling.stages,
            num_warps=self.tiling.warps,
        )


def _strides(cache: PagedCache) -> tuple[int, int, int, int]:
    """Of block, head, token and number, in numbers."""
    block, head, token, _, number, _ = cache.layers[0].stride()
    return block, head, token, number


def _tiles(first: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Cuts every request's part into tiles of at most `size`: int32 [tiles, 2] of request and start within it."""
    counts = -(-np.diff(first) // size)
    request = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    return to_device(np.stack([request, number * size], axis=1), device)


# What changes from launch to launch must not be part of what is compiled: an engine would stop for seconds when a
# step brings a number that divides by 16 for the first time.
_per_launch = triton.jit(
    do_not_specialize=["total_tokens", "total_fills", "first_layer", "layer_stride", "window"],
    do_not_specialize_on_alignment=["block_ids", "requests", "tiles", "rotations", "scores", "source", "target"],
)


@_per_launch
def _raw_scores_kernel(
    key_addresses,
    block_stride,
    head_stride,
    token_stride,
    number_stride,
    block_ids,
    requests,
    tiles,
    rotations,
    mean_real,
    mean_imag,
    spread,
    raw,
    total_tokens,
    first_layer,
    ALIGNMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    TERMS: tl.constexpr,
    MAGNITUDE_TERMS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BANDS: tl.constexpr,
    PADDED_BANDS: tl.constexpr,
    ROTARY_BANDS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Heads run fastest: where a block stores them side by side, neighbours read side by side.
    head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS
    row = tl.program_id(1)
    layer = first_layer + row

    request = tl.load(tiles + 2 * tile)
    start = tl.load(tiles + 2 * tile + 1)
    first_token = tl.load(requests + 5 * request)
    tokens = tl.load(requests + 5 * request + 1)
    first_block = tl.load(requests + 5 * request + 2)

    # This request's weights, cut into three bf16 that stand in columns `term * PADDED_GROUP + member`.
    band = tl.arange(0, PADDED_BANDS)
    is_band = band < BANDS
    column = tl.arange(0, COLUMNS)
    member = column % PADDED_GROUP
    term = (column // PADDED_GROUP)[None, :]
    at = ((layer * KV_HEADS + head) * GROUP + member)[None, :] * BANDS + band[:, None]
    is_weight = is_band[:, None] & (member < GROUP)[None, :]
    mean_x = tl.load(mean_real + at, mask=is_weight, other=0.0)
    mean_y = tl.load(mean_imag + at, mask=is_weight, other=0.0)
    turn_x = tl.load(rotations + request * 2 * BANDS + band, mask=is_band, other=0.0)[:, None]
    turn_y = tl.load(rotations + request * 2 * BANDS + BANDS + band, mask=is_band, other=0.0)[:, None]
    weight_x = _column_terms(mean_x * turn_x - mean_y * turn_y, term)
    weight_y = _column_terms(mean_x * turn_y + mean_y * turn_x, term)
    weight_norm = _column_terms(tl.load(spread + at, mask=is_weight, other=0.0), term)

    keys = tl.multiple_of(tl.load(key_addresses + layer).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    keys += head.to(tl.int64) * head_stride
    # Which number of a key is band f's real part, and which its imaginary part.
    if ROTARY_BANDS == BANDS:
        number_x = band
        number_y = band + BANDS
    else:
        number_x = tl.where(band < ROTARY_BANDS, band, band + ROTARY_BANDS)
        number_y = tl.where(band < ROTARY_BANDS, band + ROTARY_BANDS, band + BANDS)
        if ROTARY_BANDS % 8 == 0 and BANDS % 8 == 0:
            number_x = tl.max_contiguous(tl.multiple_of(number_x, 8), 8)
            number_y = tl.max_contiguous(tl.multiple_of(number_y, 8), 8)
    pair = tl.arange(0, 2 * PADDED_BANDS)

    out_member = tl.arange(0, PADDED_GROUP)
    out = raw + ((row * KV_HEADS + head) * GROUP + out_member).to(tl.int64)[None, :] * total_tokens + first_token
    for step in tl.range(0, tl.minimum(TILES, tl.cdiv(tokens - start, TILE)), num_stages=STAGES):
        slot = start + step * TILE + tl.arange(0, TILE)
        live = slot < tokens
        block = tl.load(block_ids + first_block + slot // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        key = (keys + block * block_stride + (slot % BLOCK_SIZE) * token_stride)[:, None]
        if INTERLEAVED:
            both = tl.load(
                key + pair[None, :] * number_stride, mask=live[:, None] & (pair < 2 * BANDS)[None, :], other=0.0
            )
            x, y = tl.split(tl.reshape(both, (TILE, PADDED_BANDS, 2)))
        else:
            is_number = live[:, None] & is_band[None, :]
            x = tl.load(key + number_x[None, :] * number_stride, mask=is_number, other=0.0)
            y = tl.load(key + number_y[None, :] * number_stride, mask=is_number, other=0.0)
        wide_x = x.to(tl.float32)
        wide_y = y.to(tl.float32)
        sums = tl.zeros((TILE, COLUMNS), tl.float32)
        if TERMS == 1:
            sums = tl.dot(x.to(tl.bfloat16), weight_x, sums)
            sums = tl.dot(y.to(tl.bfloat16), weight_y, sums)
        else:
            sums = _dot_terms(wide_x, weight_x, sums, TERMS)
            sums = _dot_terms(wide_y, weight_y, sums, TERMS)
        sums = _dot_terms(tl.sqrt(wide_x * wide_x + wide_y * wide_y), weight_norm, sums, MAGNITUDE_TERMS)
        scores = tl.sum(tl.reshape(sums, (TILE, COLUMNS // PADDED_GROUP, PADDED_GROUP)), axis=1)
        tl.store(out + slot[:, None], scores, mask=live[:, None] & (out_member < GROUP)[None, :])


@triton.jit
def _upper(x):
    """The bf16 towards zero from fp32 x, as fp32: cheaper than rounding, and x minus it is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot_terms(x, weights, sums, TERMS: tl.constexpr):
    """sums + x @ weights with fp32 x, as TERMS products of bf16."""
    for _ in tl.static_range(TERMS - 1):
        upper = _upper(x)
        sums = tl.dot(upper.to(tl.bfloat16), weights, sums)
        x = x - upper
    return tl.dot(x.to(tl.bfloat16), weights, sums)


@triton.jit
def _column_terms(weights, term):
    """fp32 weights [bands, columns] as bf16: the first, second or third part by the column's term, else zero."""
    first = _upper(weights)
    second = _upper(weights - first)
    third = weights - first - second
    later = tl.where(term == 2, third, 0.0)
    return tl.where(term == 0, first, tl.where(term == 1, second, later)).to(tl.bfloat16)


@_per_launch
def _standardise_kernel(
    raw,
    scores,
    requests,
    total_tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One request, layer and KV head: z-scores of each query head over the tokens, then the group's maximum."""
    head = tl.program_id(0) % KV_HEADS
    request = tl.program_id(0) // KV_HEADS
    row = tl.program_id(1) * KV_HEADS + head
    first_token = tl.load(requests + 5 * request)
    tokens = tl.load(requests + 5 * request + 1)

    member = tl.arange(0, PADDED_GROUP)
    is_member = (member < GROUP)[:, None]
    lane = tl.arange(0, BLOCK)
    rows = raw + (row * GROUP + member).to(tl.int64)[:, None] * total_tokens + first_token

    sums = tl.zeros((PADDED_GROUP, BLOCK), tl.float32)
    largest = tl.zeros((PADDED_GROUP, BLOCK), tl.float32)
    for start in tl.range(0, tokens, BLOCK):
        slot = (start + lane)[None, :]
        x = tl.load(rows + slot, mask=is_member & (slot < tokens), other=0.0)
        sums += x
        largest = tl.maximum(largest, tl.abs(x))
    mean = (tl.sum(sums, axis=1) / tokens)[:, None]
    # Equal scores are not quite equal to their rounded mean: what is left is no deviation. 4 eps of fp32.
    rounding = tl.max(largest, axis=1)[:, None] * 4.76837158203125e-07

    squares = tl.zeros((PADDED_GROUP, BLOCK), tl.float32)
    for start in tl.range(0, tokens, BLOCK):
        slot = (start + lane)[None, :]
        is_score = is_member & (slot < tokens)
        centred = tl.load(rows + slot, mask=is_score, other=0.0) - mean
        squares += tl.where(is_score, centred * centred, 0.0)
    deviation = tl.sqrt(tl.sum(squares, axis=1) / tokens)[:, None]

    for start in tl.range(0, tokens, BLOCK):
        slot = (start + lane)[None, :]
        x = tl.load(rows + slot, mask=is_member & (slot < tokens), other=0.0)
        z = tl.where(deviation <= rounding, 0.0, (x - mean) / deviation)
        best = tl.max(tl.where(is_member, z, float("-inf")), axis=0)
        at = start + lane
        tl.store(scores + row.to(tl.int64) * total_tokens + first_token + at, best, mask=at < tokens)


@_per_launch
def _plan_kernel(scores, source, target, requests, window, total_tokens, total_fills, BLOCK: tl.constexpr):
    """One request and set: finds the lowest kept score by bisection over its bits, then lists sources and holes."""
    row = tl.program_id(0).to(tl.int64)
    request = tl.program_id(1)
    scores += row * total_tokens + tl.load(requests + 5 * request)
    tokens = tl.load(requests + 5 * request + 1)
    source += row * total_fills + tl.load(requests + 5 * request + 3)
    target += row * total_fills + tl.load(requests + 5 * request + 3)
    dead = tl.load(requests + 5 * request + 4)
    old = tokens - window
    keep = old - dead
    lane = tl.arange(0, BLOCK)

    # The highest rank that at least `keep` old slots reach, bit by bit. Most rows are one block, held in registers.
    ranks = _old_ranks(scores, lane, old)
    lowest = tl.zeros((), tl.uint32)
    bit = tl.full((), 2147483648, tl.uint32)
    for _ in tl.range(0, 32):
        candidate = lowest | bit
        reach = (ranks >= candidate).to(tl.int32)
        for start in tl.range(BLOCK, old, BLOCK):
            reach += (_old_ranks(scores, start + lane, old) >= candidate).to(tl.int32)
        lowest = tl.where(tl.sum(reach, axis=0) >= keep, candidate, lowest)
        bit = bit >> 1
    above = (ranks > lowest).to(tl.int32)
    for start in tl.range(BLOCK, old, BLOCK):
        above += (_old_ranks(scores, start + lane, old) > lowest).to(tl.int32)
    ties_kept = keep - tl.sum(above, axis=0)

    ties = tl.zeros((), tl.int32)
    moves = tl.zeros((), tl.int32)
    holes = tl.zeros((), tl.int32)
    for start in tl.range(0, tokens, BLOCK):
        slot = start + lane
        rank = _old_ranks(scores, slot, old)
        tie = ((slot < old) & (rank == lowest)).to(tl.int32)
        # Ties go to the lower slots.
        wins = (tie > 0) & (ties + tl.cumsum(tie, axis=0) <= ties_kept)
        kept = (slot >= old) | (rank > lowest) | wins
        move = (kept & (slot < dead)).to(tl.int32)
        hole = ((kept == 0) & (slot >= dead) & (slot < tokens)).to(tl.int32)
        tl.store(source + moves + tl.cumsum(move, axis=0) - 1, slot, mask=move > 0)
        tl.store(target + holes + tl.cumsum(hole, axis=0) - 1, slot, mask=hole > 0)
        ties += tl.sum(tie, axis=0)
        moves += tl.sum(move, axis=0)
        holes += tl.sum(hole, axis=0)
    for start in tl.range(0, dead, BLOCK):
        fill = start + lane
        tl.store(source + fill, tl.full((BLOCK,), -1, tl.int32), mask=(fill >= moves) & (fill < dead))
        tl.store(target + fill, tl.full((BLOCK,), -1, tl.int32), mask=(fill >= moves) & (fill < dead))


@triton.jit
def _old_ranks(scores, slot, old):
    """Unsigned integers in the order of the scores, NaN as the lowest, -0 as 0; and 0, below all, from `old` on."""
    score = tl.load(scores + slot, mask=slot < old, other=0.0)
    score = tl.where(score == score, score, float("-inf")) + 0.0
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where(slot < old, tl.where(bits >= 2147483648, bits ^ 4294967295, bits | 2147483648), 0)


@_per_launch
def _compact_kernel(
    key_addresses,
    value_addresses,
    key_block_stride,
    key_head_stride,
    key_token_stride,
    key_number_stride,
    value_block_stride,
    value_head_stride,
    value_token_stride,
    value_number_stride,
    block_ids,
    requests,
    tiles,
    source,
    target,
    total_fills,
    layer_stride,
    ALIGNMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Up to TILE survivors of one request, layer and head: their key and value rows, into holes."""
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    tile = tl.program_id(0) // KV_HEADS
    layer = tl.program_id(1)
    request = tl.load(tiles + 2 * tile)
    start = tl.load(tiles + 2 * tile + 1)
    block_ids += tl.load(requests + 5 * request + 2)
    first_fill = tl.load(requests + 5 * request + 3)
    dead = tl.load(requests + 5 * request + 4)

    fill = start + tl.arange(0, TILE)
    at = layer.to(tl.int64) * layer_stride + head * total_fills + first_fill + fill
    from_slot = tl.load(source + at, mask=fill < dead, other=-1)
    is_move = from_slot >= 0
    to_slot = tl.load(target + at, mask=is_move, other=0)
    from_block = tl.load(block_ids + from_slot // BLOCK_SIZE, mask=is_move, other=0).to(tl.int64)
    to_block = tl.load(block_ids + to_slot // BLOCK_SIZE, mask=is_move, other=0).to(tl.int64)
    from_token = from_slot % BLOCK_SIZE
    to_token = to_slot % BLOCK_SIZE

    number = tl.arange(0, PADDED_DIM)[None, :]
    is_number = is_move[:, None] & (number < HEAD_DIM)
    keys = tl.multiple_of(tl.load(key_addresses + layer).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    keys += head * key_head_stride + number * key_number_stride
    values = tl.multiple_of(tl.load(value_addresses + layer).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    values += head * value_head_stride + number * value_number_stride
    key = tl.load(keys + (from_block * key_block_stride + from_token * key_token_stride)[:, None], mask=is_number)
    value = tl.load(
        values + (from_block * value_block_stride + from_token * value_token_stride)[:, None], mask=is_number
    )
    tl.store(keys + (to_block * key_block_stride + to_token * key_token_stride)[:, None], key, mask=is_number)
    tl.store(values + (to_block * value_block_stride + to_token * value_token_stride)[:, None], value, mask=is_number)
