"""The compaction plan against a plain Python model."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.hole_fills import hole_fills
from triattention.bounds import blocks_bound
from triattention.compaction import first_live_block
from triattention.config import CompressionConfig


def config(budget: int, interval: int) -> CompressionConfig:
    return CompressionConfig(budget=budget, interval=interval, window=0, policy="random")


@given(
    budget=st.integers(32, 300),
    interval=st.integers(1, 200),
    block=st.sampled_from([16, 32, 64]),
    pinned=st.integers(0, 5),
    in_flight=st.integers(1, 3),
)
def test_a_decoding_request_keeps_its_budget_strands_nothing_and_stays_within_its_bound(
    budget: int, interval: int, block: int, pinned: int, in_flight: int
) -> None:
    settings = config(budget, interval)
    first = pinned
    for processed in range(pinned * block, pinned * block + 4 * (budget + interval)):
        cut = first_live_block(processed, first, block, settings)
        if cut is not None:
            kept = processed - cut * block
            assert budget <= kept < budget + block
            assert cut > first
            first = cut
        slots = processed + in_flight  # what vLLM allocates next
        held = -(-slots // block) - first + pinned
        assert held <= blocks_bound(pinned * block, slots, block, settings, in_flight)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(2, 40), st.data())
def test_hole_fills_leave_exactly_the_kept_tokens_in_the_live_slots(
    seed: int, layers: int, heads: int, tokens: int, data: st.DataObject
) -> None:
    dead = data.draw(st.integers(1, tokens - 1))
    keep = tokens - dead
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(layers, heads, tokens, generator=draw).argsort(-1)
    kept = torch.zeros(layers, heads, tokens, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
    cache = torch.arange(tokens).expand(layers, heads, tokens).clone()  # slot i holds token i
    moves = hole_fills(kept, dead)
    cache[moves.layer, moves.head, moves.target] = cache[moves.layer, moves.head, moves.source]
    for layer in range(layers):
        for head in range(heads):
            survivors = set(kept[layer, head].nonzero().flatten().tolist())
            assert set(cache[layer, head, dead:].tolist()) == survivors
    # Only survivors of dying blocks move: never more than die.
    assert moves.source.numel() <= layers * heads * dead
