# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
"""TriAttention scores of keys in paged caches.

Where the time goes, for one request of 2,176 tokens of Qwen3-8B (36 layers, 8 KV heads, 128 bf16 numbers): 160 MB of
keys are read, 10 MB of raw scores written and read again, at most 19 MB of survivors copied. All of it is bound by
memory, if only the arithmetic keeps out of the way; so products run on the tensor cores and loads are pipelined.

Tensor cores multiply bf16. Numbers that do not fit are cut into several bf16 that add up to them: the products are
exact and sum up in fp32, so nothing is lost against fp32 arithmetic but 2^-17 of the magnitudes of 16-bit keys.

(Functions under `triton.jit` are Triton, not Python: they carry no types.)
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention.kernels.vocabulary import LiveRegions, PagedCache, QueryWeights
from triattention.kernels.with_triton.launch import per_launch, strides, tiles_of

# Raw scores are made and standardised for a few layers at a time, so that they stay in the L2 cache in between and
# take little memory beside vLLM's.
_RAW_BYTES = 32 << 20

# Scores that a program of the small kernels holds in registers at a time.
_SCORES_AT_ONCE = 8192

_FLOATS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
# How many bf16 make up one number of the cache exactly.
_TERMS = {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 1, torch.float8_e5m2: 1}


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
        self.tiles = tiles_of(regions.first_token, tiling.tile * tiling.tiles, keys.device)

    def launch(self, raw: Tensor, first_layer: int) -> None:
        """Raw scores of the layers from `first_layer` on, into [layers, kv_heads, group, tokens]."""
        keys, weights = self.keys, self.weights
        padded_group = triton.next_power_of_2(weights.group)
        _raw_scores_kernel[(len(self.tiles) * keys.kv_heads, raw.shape[0])](
            keys.addresses,
            *strides(keys),
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


@per_launch
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


@per_launch
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
