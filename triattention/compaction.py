"""The compaction plan: which blocks die and which survivors move where. Pure; knows nothing of vLLM.

Blocks of a request, block size 4, two pinned prompt blocks, budget 8, at L = 22 processed tokens:

    block       0     1     2     3     4     5
    slots    [0..3][4..7][8..11][12..15][16..19][20..23]
              pinned        live region, 14 tokens

`first_live_block` cuts at block (22 - 8) // 4 = 3, so block 2 dies and the 10 slots 12..21 stay. Of the 14 scored
tokens the best 10 are kept; each one that stands in block 2 is copied into a hole, an evicted slot of 12..21. Slots
keep their order by position only before the first compaction; attention does not care, RoPE is in the keys.
"""

from dataclasses import dataclass

import torch

from triattention.config import CompressionConfig


def first_live_block(processed_tokens: int, first_block: int, block_size: int, config: CompressionConfig) -> int | None:
    """Block at which the live region starts after a compaction at `processed_tokens`, or None where none is due.

    `first_block` is where it starts now. The kept count `processed_tokens - cut * block_size` is at least the
    budget and less than budget + block_size, so no slot is stranded.
    """
    if processed_tokens - first_block * block_size < config.budget + config.interval:
        return None
    cut = (processed_tokens - config.budget) // block_size
    return cut if cut > first_block else None


@dataclass(frozen=True)
class Moves:
    """Copies of one token's key and value within one (layer, KV head); parallel int64 vectors [moves]."""

    layer: torch.Tensor
    head: torch.Tensor
    source: torch.Tensor
    """Slot in the dying blocks, counted from the start of the old live region."""
    target: torch.Tensor
    """Evicted slot in the surviving blocks, counted the same way."""


def hole_fills(kept: torch.Tensor, dead_slots: int) -> Moves:
    """Copies that bring every survivor of the first `dead_slots` slots into a hole of the rest.

    `kept` is bool [layers, kv_heads, tokens] with exactly `tokens - dead_slots` True per (layer, head), so each
    (layer, head) has as many survivors to move as holes to fill, and both lists line up row by row.
    """
    layer, head, source = kept[..., :dead_slots].nonzero(as_tuple=True)
    _, _, hole = (~kept[..., dead_slots:]).nonzero(as_tuple=True)
    assert hole.numel() == source.numel(), "kept count differs from the number of live slots"
    return Moves(layer, head, source, hole + dead_slots)
