"""Random eviction: the baseline that every other policy must beat."""

import torch

from triattention.config import CompressionConfig
from triattention.policies.base import Policy, PolicyContext, register


@register("random")
class Random(Policy):
    """Uniform scores in [0, 1) that depend on `seed`, layer, global KV head, slot and position, and on nothing
    else.

    So they are the same from run to run, on CPU and GPU, and whichever tensor-parallel rank holds the head.
    Needs no statistics.
    """

    def __init__(self, config: CompressionConfig, context: PolicyContext) -> None:
        self.seed = config.seed
        self.layers = torch.tensor(context.layers)
        self.kv_heads = torch.tensor(list(context.kv_heads))

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        device = keys.device
        slots = torch.arange(keys.shape[2], device=device)
        bits = _mix(torch.tensor([self.seed], device=device)) + position
        bits = _mix(bits) + self.layers.to(device)[:, None, None]
        bits = _mix(bits) + self.kv_heads.to(device)[:, None]
        bits = _mix(_mix(bits) + slots)
        return (bits & 0xFFFFFF).float() / (1 << 24)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64 (Steele et al. 2014) on int64: products wrap, and masks make the shifts unsigned."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))
