"""Segments: every run of the text loses its share, whatever the scores and wherever survivors were copied to."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.hole_fills import hole_fills
from triattention import kernels
from triattention.config import CompressionConfig, Selection
from triattention.kernels import HoleFills, LiveRegion, LiveRegions
from triattention.segments import SegmentQuota, spread_evictions
from triattention.selection import select


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    sets, heads, tokens = draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 20)))
    value = st.sampled_from([-1.0, 0.0, 1.0, 2.5, float("inf"), -float("inf"), float("nan")])
    size = sets * heads * tokens
    scores = torch.tensor(draw(st.lists(value, min_size=size, max_size=size))).view(sets, heads, tokens)
    rows = [draw(st.permutations(range(100, 100 + tokens))) for _ in range(sets * heads)]
    evictable = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    evictions = draw(st.integers(0, int(evictable.sum())))
    return scores, torch.tensor(rows).view(sets, heads, tokens), evictable, evictions, draw(st.integers(1, 9))


def expected_evictions(
    scores: list[float], positions: list[int], evictable: list[bool], evictions: int, segments: int
) -> set[int]:
    """The rule in plain Python for one row."""
    order = sorted((slot for slot in range(len(scores)) if evictable[slot]), key=positions.__getitem__)
    number, gone = len(order), set[int]()
    for segment in range(segments):
        start, end = segment * number // segments, (segment + 1) * number // segments
        share = (end * evictions // number - start * evictions // number) if number else 0
        score = {slot: -1e38 if not scores[slot] > -float("inf") else scores[slot] for slot in order[start:end]}
        gone |= set(sorted(order[start:end], key=lambda slot: (score[slot], positions[slot]))[:share])
    return gone


@given(case=cases())
def test_evicts_what_the_rule_says(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]) -> None:
    scores, positions, evictable, evictions, segments = case
    spread = spread_evictions(*case)
    for row, places, result in zip(scores.flatten(0, 1), positions.flatten(0, 1), spread.flatten(0, 1), strict=True):
        gone = set((result == -torch.inf).nonzero().flatten().tolist())
        assert len(gone) == evictions
        assert gone == expected_evictions(row.tolist(), places.tolist(), evictable.tolist(), evictions, segments)


def test_docstring_example() -> None:
    scores = torch.tensor([[[5.0, 1, 2, 9, 8, 7, 0, 3]]])
    evictable = torch.tensor([True] * 6 + [False] * 2)
    spread = spread_evictions(scores, torch.arange(8).view(1, 1, 8), evictable, evictions=3, segments=3)
    assert (spread == -torch.inf).nonzero()[:, 2].tolist() == [1, 2, 5]


@pytest.mark.parametrize("selection", ["per_head", "per_layer_per_head"])
def test_positions_follow_the_survivors_over_many_compactions(selection: Selection) -> None:
    """Against a plain list per layer and head of which text position every slot of the cache holds."""
    generator = torch.Generator().manual_seed(0)
    layers, heads, budget, interval = 2, 2, 40, 8
    config = CompressionConfig(budget=budget, window=4, policy="random", selection=selection, segments=4)
    quota = SegmentQuota(config)
    cache = [[list(range(1000)) for _ in range(heads)] for _ in range(layers)]  # slot -> position
    first_slot, processed = 16, 16 + budget + interval
    for _ in range(20):
        tokens = processed - first_slot
        protected = torch.zeros(tokens, dtype=torch.bool)
        protected[20:24] = True
        scores = torch.randn(layers, heads, tokens, generator=generator)
        spread = quota.spread("a", first_slot, scores, protected, interval)
        assert (spread[..., 20:24] > -torch.inf).all()
        kept = select(spread, tokens - interval, config.window, selection)
        for layer, head in product(range(layers), range(heads)):
            live = cache[layer][head][first_slot:processed]
            gone = sorted(live[slot] for slot in (~kept[layer, head]).nonzero().flatten().tolist())
            text = sorted(live[slot] for slot in range(tokens - config.window) if not protected[slot])
            for segment in range(4):
                run = text[segment * len(text) // 4 : (segment + 1) * len(text) // 4]
                assert len(set(run) & set(gone)) == interval // 4
        moves = hole_fills(kept, interval)
        fills = planned(spread, interval, config)
        quota.moved("a", fills.source, fills.target)
        for layer, head, source, target in torch.stack(
            [moves.layer, moves.head, moves.source, moves.target], dim=1
        ).tolist():
            cache[layer][head][first_slot + target] = cache[layer][head][first_slot + source]
        first_slot, processed = first_slot + interval, processed + interval


def planned(scores: torch.Tensor, dead_slots: int, config: CompressionConfig) -> HoleFills:
    tokens = scores.shape[-1]
    regions = LiveRegions([LiveRegion(range(tokens), tokens, dead_slots, 0)], 1, "cpu")
    return kernels.plan(scores, regions, config.window, config.selection == "per_head")


def test_a_request_that_starts_over_after_a_preemption_stands_in_its_own_slots() -> None:
    quota = SegmentQuota(CompressionConfig(budget=40, window=4, policy="random", segments=4))
    none = torch.zeros(48, dtype=torch.bool)
    fills = planned(quota.spread("a", 16, torch.arange(48.0).expand(1, 1, 48), none, 8), 8, quota.config)
    quota.moved("a", fills.source, fills.target)
    assert quota.positions("a", 24, (1, 1, 41))[0, 0].tolist() != list(range(24, 65))
    assert quota.positions("a", 16, (1, 1, 4))[0, 0].tolist() == [16, 17, 18, 19]
    quota.forget(["a", "b"])
    assert quota.positions("a", 24, (1, 1, 41))[0, 0].tolist() == list(range(24, 65))
