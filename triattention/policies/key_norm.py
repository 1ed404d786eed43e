"""Key norm: keep the keys of small norm."""

import torch

from triattention.config import CompressionConfig
from triattention.policies.base import Policy, PolicyContext, register
from triattention.scoring import standardise


@register("key_norm")
class KeyNorm(Policy):
    """Keys of small L2 norm draw the most attention (Devoto et al. 2024, arXiv:2406.11430; KnormPress of
    kvpress).

    RoPE turns a key without changing its norm, so cached keys serve as they are. Needs no statistics.
    """

    def __init__(self, config: CompressionConfig, context: PolicyContext) -> None:
        pass

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        return standardise(-keys.float().norm(dim=-1))
