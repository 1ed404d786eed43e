"""From scores to the set of tokens that are kept. Decides nothing about blocks; the compaction plan does."""

import torch

from triattention.config import Selection


def select(scores: torch.Tensor, keep: int, window: int, selection: Selection) -> torch.Tensor:
    """Mask of kept slots, bool [layers, kv_heads, tokens], with exactly `keep` True per (layer, KV head).

    `scores`: fp32 [layers, kv_heads, tokens], higher means keep; NaN counts as the lowest.
    The last `window` slots are always kept; the rest of `keep` goes to the highest scores before them. Equal
    scores go to the lower slot. `per_head` averages the scores over layers first, so that a head's set is the
    same in all layers (the mask is then one set, expanded: do not write into it); `per_layer_per_head`
    selects on its own in every layer.

    Ten slots, keep 5, window 2 (scores in tenths):

        slot    0 1 2 3 4 5 6 7 | 8 9
        score   3 9 1 9 2 0 9 4 | 0 7
        kept      x   x     x   | x x
    """
    layers, _, tokens = scores.shape
    assert window <= keep <= tokens, f"window {window} <= keep {keep} <= tokens {tokens} must hold"
    if selection == "per_head":
        scores = scores.mean(dim=0, keepdim=True)
    old = scores[..., : tokens - window].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = old.argsort(dim=-1, descending=True, stable=True)
    kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    kept[..., : tokens - window] = False
    kept.scatter_(-1, order[..., : keep - window], True)
    return kept.expand(layers, -1, -1)
