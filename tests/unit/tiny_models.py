"""Tiny transformers models and statistics with random numbers, for the tests of scoring and calibration."""

from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from triattention.rope import RopeParameters
from triattention.statistics import QueryStatistics, model_facts

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**(SIZES | {"head_dim": 16} | changes))


def qwen3(**changes: Any) -> PreTrainedConfig:
    return Qwen3Config(**(SIZES | {"head_dim": 16} | changes))


def yarn(**changes: Any) -> PreTrainedConfig:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    return qwen3(rope_parameters=rope, **changes)


def random_statistics(config: PreTrainedConfig, seed: int = 0) -> QueryStatistics:
    """Statistics of queries with a random mean and random spread: E|q| > |E q|, as it must be."""
    facts, rope = model_facts(config), RopeParameters.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    shape = (facts["num_hidden_layers"], facts["num_attention_heads"], rope.bands)
    mean = torch.randn(shape, dtype=torch.complex64, generator=generator)
    return QueryStatistics(
        model_id="tiny",
        facts=facts,
        rope=rope,
        layers=tuple(range(shape[0])),
        tokens=1000,
        query_mean=mean,
        query_magnitude=mean.abs() + torch.rand(shape, generator=generator),
    )
