# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
"""Block tables without their null blocks: what attention reads of a compacted request.

(Functions under `triton.jit` are Triton, not Python: they carry no types.)
"""

import triton.language as tl
from torch import Tensor

from triattention.kernels.with_triton.launch import per_launch

# Block ids that a program holds in registers at a time.
_IDS_AT_ONCE = 1024


def squeeze(block_table: Tensor, lengths: Tensor, block_size: int, squeezed: Tensor, live_lengths: Tensor) -> None:
    _squeeze_kernel[(block_table.shape[0],)](
        block_table,
        lengths,
        squeezed,
        live_lengths,
        block_table.stride(0),
        squeezed.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_IDS_AT_ONCE,
        num_warps=4,
    )


@per_launch
def _squeeze_kernel(
    block_table,
    lengths,
    squeezed,
    live_lengths,
    row_stride,
    squeezed_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: finds its run of null blocks, then copies what stands before and behind it; of nulls alone, all."""
    row = tl.program_id(0).to(tl.int64)
    block_table += row * row_stride
    squeezed += row * squeezed_stride
    length = tl.load(lengths + row)
    used = tl.cdiv(length, BLOCK_SIZE)
    lane = tl.arange(0, BLOCK)

    nulls = tl.zeros((BLOCK,), tl.int32)
    firsts = tl.zeros((BLOCK,), tl.int32) + used
    for start in tl.range(0, used, BLOCK):
        column = start + lane
        is_null = tl.load(block_table + column, mask=column < used, other=1) == 0
        nulls += is_null.to(tl.int32)
        firsts = tl.minimum(firsts, tl.where(is_null, column, used))
    count = tl.sum(nulls, axis=0)
    count = tl.where(count == used, 0, count)
    first = tl.min(firsts, axis=0)

    for start in tl.range(0, used - count, BLOCK):
        column = start + lane
        is_live = column < used - count
        ids = tl.load(block_table + column + tl.where(column < first, 0, count), mask=is_live, other=0)
        tl.store(squeezed + column, ids, mask=is_live)
    tl.store(live_lengths + row, length - count * BLOCK_SIZE)
