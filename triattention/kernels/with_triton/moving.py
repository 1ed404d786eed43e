# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
"""Copies survivors of dying blocks into holes of live ones.

(Functions under `triton.jit` are Triton, not Python: they carry no types.)
"""

import math

import triton
import triton.language as tl

from triattention.kernels.vocabulary import HoleFills, LiveRegions, PagedCache
from triattention.kernels.with_triton.launch import INTEGERS, per_launch, strides, tiles_of

_FILL_TILE = 32


def compact(keys: PagedCache, values: PagedCache, regions: LiveRegions, fills: HoleFills) -> None:
    assert keys.is_plain, "keys and values of GPU backends lie in plain rows"
    assert values.is_plain, "keys and values of GPU backends lie in plain rows"
    assert (keys.dtype, keys.head_dim) == (values.dtype, values.head_dim), "keys and values differ in kind"
    if regions.fills == 0:
        return
    tiles = tiles_of(regions.first_fill, _FILL_TILE, keys.device)
    _compact_kernel[(len(tiles) * keys.kv_heads, len(keys.layers))](
        keys.addresses,
        values.addresses,
        *strides(keys),
        *strides(values),
        regions.block_ids,
        regions.requests,
        tiles,
        fills.source,
        fills.target,
        regions.fills,
        fills.source.stride(0) if fills.source.shape[0] > 1 else 0,
        ALIGNMENT=math.gcd(keys.alignment, values.alignment),
        DTYPE=INTEGERS[keys.dtype.itemsize],
        KV_HEADS=keys.kv_heads,
        BLOCK_SIZE=regions.block_size,
        HEAD_DIM=keys.head_dim,
        PADDED_DIM=triton.next_power_of_2(keys.head_dim),
        TILE=_FILL_TILE,
        num_warps=4,
    )


@per_launch
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
