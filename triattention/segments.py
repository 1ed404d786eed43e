"""Evictions spread evenly over the text (`segments`): where the live tokens stand in it, and which of them go.

A compaction copies survivors into holes, so slots soon say nothing about order. What policies score needs no
positions; this does, so the worker keeps them, per head, for requests that were compacted. Owns no keys and no blocks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from triattention.config import CompressionConfig


def spread_evictions(scores: Tensor, positions: Tensor, evictable: Tensor, evictions: int, segments: int) -> Tensor:
    """Scores with exactly `evictions` of -inf per row, equally many (to one) in each segment of the evictable tokens.

    `scores`: fp32 [sets, kv_heads, tokens]. `positions`: int [sets, kv_heads, tokens], each slot's token's place in the
    text. `evictable`: bool [tokens]. A row's evictable tokens, in order of position, are cut into `segments` runs of
    equal number (to one), and the lowest scores of each run go; of equal scores the older. A quota of evictions per
    segment is what the "V3" hybrid of community ports of TriAttention adds (8 segments).

    Eight tokens in order of position, six of them evictable, three evictions, three segments:

        score       5 1 | 2 9 | 8 7 | 0 3        evictable
        evicted       x   x       x
    """
    slots = evictable.nonzero().flatten()
    number = len(slots)
    assert evictions <= number, f"{evictions} evictions of {number} evictable tokens"
    lowest = torch.finfo(scores.dtype).min
    spread = scores.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf)
    in_order = slots[positions[..., slots].argsort(dim=-1)]
    for segment in range(segments):
        start, end = segment * number // segments, (segment + 1) * number // segments
        if start == end:
            continue
        members = in_order[..., start:end]
        count = end * evictions // number - start * evictions // number
        worst = spread.gather(-1, members).argsort(dim=-1, stable=True)[..., :count]
        spread.scatter_(-1, members.gather(-1, worst), -torch.inf)
    return spread


class SegmentQuota:
    """Applies `segments` to one KV-cache group, and keeps for each compacted request where its live tokens stand.

    Slot = position until a compaction copies survivors into holes; what is decoded after it stands in its own slot
    again.
    """

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config
        self._live: dict[str, tuple[int, Tensor]] = {}
        """Request id -> first live slot, and int32 [sets, kv_heads, slots] of what was live right after its last
        compaction; `sets` is 1 where all layers share a head's set."""

    def spread(self, request_id: str, first_slot: int, scores: Tensor, protected: Tensor, dead_slots: int) -> Tensor:
        """`scores` [layers, kv_heads, tokens] of the live slots from `first_slot` on, what has to go at -inf.

        `protected`: bool [tokens], slots that stay beside the window.
        """
        layers, heads, tokens = scores.shape
        if self.config.selection == "per_head":
            scores = scores.mean(dim=0, keepdim=True)
        evictable = ~protected
        evictable[tokens - self.config.window :] = False
        positions = self.positions(request_id, first_slot, (len(scores), heads, tokens)).to(scores.device)
        self._live[request_id] = (first_slot, positions)
        return spread_evictions(scores, positions, evictable, dead_slots, self.config.segments).expand(layers, -1, -1)

    def moved(self, request_id: str, source: Tensor, target: Tensor) -> None:
        """Follows every `spread`: survivors were copied, and the dead slots are gone.

        `source`, `target`: int32 [sets, kv_heads, dead slots], a request's part of `triattention.kernels.HoleFills`.
        """
        first_slot, positions = self._live[request_id]
        tokens, dead_slots = positions.shape[-1], source.shape[-1]
        survivors = positions.gather(-1, source.clamp_min(0).long())
        # What is no copy (-1) goes into a spare slot.
        with_spare = torch.nn.functional.pad(positions, (0, 1))
        with_spare.scatter_(-1, target.long().masked_fill(target < 0, tokens), survivors)
        self._live[request_id] = (first_slot + dead_slots, with_spare[..., dead_slots:tokens].clone())

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that ended."""
        for request_id in request_ids:
            self._live.pop(request_id, None)

    def positions(self, request_id: str, first_slot: int, shape: tuple[int, int, int]) -> Tensor:
        """Where in the text the tokens of the live slots stand, int32 [sets, kv_heads, tokens]; a new tensor."""
        sets, heads, tokens = shape
        positions = torch.arange(first_slot, first_slot + tokens, dtype=torch.int32).expand(sets, heads, tokens).clone()
        first_live, known = self._live.get(request_id, (-1, positions))
        # After a preemption the request starts over, with its live region back at the pinned prompt.
        if first_live == first_slot:
            positions[..., : known.shape[-1]] = known
        return positions
