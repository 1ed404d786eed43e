"""Selection keeps exactly `keep` slots, the window among them, the best of the rest, ties to the lower
slot.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triattention.config import Selection
from triattention.selection import select

SELECTIONS: tuple[Selection, ...] = ("per_head", "per_layer_per_head")


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Scores with many ties, infinities and NaN among them, and a keep and window that fit."""
    layers, kv_heads, tokens = draw(st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 24)))
    value = st.sampled_from([-1.0, 0.0, -0.0, 1.0, 2.5, float("inf"), -float("inf"), float("nan")])
    size = layers * kv_heads * tokens
    scores = torch.tensor(draw(st.lists(value, min_size=size, max_size=size)))
    keep = draw(st.integers(0, tokens))
    return scores.view(layers, kv_heads, tokens), keep, draw(st.integers(0, keep))


def expected_slots(row: list[float], keep: int, window: int) -> set[int]:
    """The rule in plain Python for one (layer, head)."""
    cut = len(row) - window
    lowest_if_nan = [(-float("inf") if x != x else x) for x in row[:cut]]
    best = sorted(range(cut), key=lambda slot: (-lowest_if_nan[slot], slot))[: keep - window]
    return {*best, *range(cut, len(row))}


@pytest.mark.parametrize("selection", SELECTIONS)
@given(case=cases())
def test_keeps_what_the_rule_says(selection: Selection, case: tuple[torch.Tensor, int, int]) -> None:
    scores, keep, window = case
    kept = select(scores, keep, window, selection)
    ranked = scores.mean(0, keepdim=True).expand_as(scores) if selection == "per_head" else scores
    assert kept.shape == scores.shape
    assert kept.dtype == torch.bool
    assert (kept.sum(-1) == keep).all()
    assert kept[..., scores.shape[-1] - window :].all()
    for layer in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            slots = set(kept[layer, head].nonzero().flatten().tolist())
            assert slots == expected_slots(ranked[layer, head].tolist(), keep, window)


def test_docstring_example() -> None:
    scores = torch.tensor([[[3.0, 9, 1, 9, 2, 0, 9, 4, 0, 7]]])
    kept = select(scores, keep=5, window=2, selection="per_layer_per_head")
    assert kept[0, 0].nonzero().flatten().tolist() == [1, 3, 6, 8, 9]


def test_per_head_shares_a_set_over_layers_and_the_other_mode_does_not() -> None:
    scores = torch.tensor([[[5.0, 0, 1, 0]], [[0.0, 4, 1, 0]]])
    shared = select(scores, keep=1, window=0, selection="per_head")
    assert shared.nonzero().tolist() == [[0, 0, 0], [1, 0, 0]]
    own = select(scores, keep=1, window=0, selection="per_layer_per_head")
    assert own.nonzero().tolist() == [[0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(("keep", "window"), [(1, 2), (5, 0)])
def test_impossible_sizes_are_caught(keep: int, window: int) -> None:
    with pytest.raises(AssertionError):
        select(torch.zeros(1, 1, 4), keep, window, "per_head")
