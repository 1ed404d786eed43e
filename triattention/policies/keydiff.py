"""KeyDiff: keep the keys that are unlike the others."""

import torch
from torch.nn.functional import normalize

from triattention.config import CompressionConfig
from triattention.policies.base import Policy, PolicyContext, register
from triattention.scoring import standardise


@register("keydiff")
class KeyDiff(Policy):
    """Negative cosine similarity to the mean direction of the head's keys (Park et al. 2025,
    arXiv:2504.15364).

    The mean is over the normalised cached keys (rotated), as KeyDiffPress of kvpress has it. Needs no
    statistics.
    """

    def __init__(self, config: CompressionConfig, context: PolicyContext) -> None:
        pass

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        directions = normalize(keys.float(), dim=-1)
        mean = normalize(directions.mean(dim=-2, keepdim=True), dim=-1)
        return standardise(-(directions * mean).sum(dim=-1))
