# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
"""Which survivors move into which holes, from scores.

(Functions under `triton.jit` are Triton, not Python: they carry no types.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triattention.kernels.vocabulary import HoleFills, LiveRegions
from triattention.kernels.with_triton.launch import per_launch

# Scores that a program holds in registers at a time.
_RANKS_AT_ONCE = 4096


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


@per_launch
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
