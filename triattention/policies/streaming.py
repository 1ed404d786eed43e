"""StreamingLLM: keep the most recent tokens."""

import torch

from triattention.config import CompressionConfig
from triattention.policies.base import Policy, PolicyContext, register


@register("streaming")
class Streaming(Policy):
    """The recent part of StreamingLLM (Xiao et al. 2023, arXiv:2309.17453); its attention sinks are the pinned prompt,
    or `sinks` where the prompt is compressed.

    The slots that survive a cut are the newest, so nothing ever moves and slot order stays position order. Needs no
    statistics.
    """

    def __init__(self, config: CompressionConfig, context: PolicyContext) -> None:
        pass

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        layers, kv_heads, tokens, _ = keys.shape
        return torch.arange(tokens, dtype=torch.float32, device=keys.device).expand(layers, kv_heads, tokens).clone()
