"""TriAttention: keep the keys that the model's own queries, as calibrated, will go on reading."""

from pathlib import Path

import torch

from triattention.config import CompressionConfig
from triattention.kernels.vocabulary import QueryWeights
from triattention.policies.base import Policy, PolicyContext, register
from triattention.scoring import Scorer, offsets_up_to
from triattention.statistics import QueryStatistics


@register("triattention")
class TriAttention(Policy):
    """Expected attention of future queries to each key, from query statistics (see `triattention.scoring`).

    `config.statistics` names the file; one that is missing or does not fit the model raises ValueError.
    """

    def __init__(self, config: CompressionConfig, context: PolicyContext) -> None:
        assert isinstance(config.statistics, Path), "CompressionConfig asks for a file, the worker resolves `self`"
        statistics = QueryStatistics.load(config.statistics, context.model_config, context.layers)
        self.scorer = Scorer(statistics, context.layers, context.kv_heads, offsets_up_to(config.max_offset))

    def score(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        return self.scorer.score(keys, position)

    def query_weights(self, device: torch.device) -> QueryWeights:
        return self.scorer.query_weights(device)
