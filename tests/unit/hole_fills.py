"""Which survivor goes into which hole, said plainly: what `triattention.kernels.plan` is compared with."""

from dataclasses import dataclass

import torch


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
