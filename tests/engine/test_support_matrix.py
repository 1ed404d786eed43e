"""Every architecture feature that the engine claims, token by token against the dense reference."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from vllm.distributed import parallel_state
from vllm.model_executor.models.utils import extract_layer_index

from tests.engine.conftest import BLOCK, SIZES, EngineFactory, save_tiny_model
from tests.engine.reference import DenseReference
from tests.engine.test_exactness import assert_pool_whole, generate, scheduler_of
from tests.unit.tiny_models import random_statistics
from triattention.config import CompressionConfig
from triattention.vllm.kv_manager import CompactedAttentionSpec

TOKENS = 350
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
HALF_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048}
HYBRID = {
    "num_hidden_layers": 4, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 32,
}  # fmt: skip

MATRIX: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, group 1, head 64": ("Llama", {"num_key_value_heads": 4, "head_dim": 64}),
    "llama 3 scaling, group 4, head 128": (
        "Llama", {"num_key_value_heads": 1, "head_dim": 128, "rope_parameters": LLAMA3}),
    "qwen2, group 2, head 80": ("Qwen2", {"hidden_size": 320}),
    "qwen3, group 8, head 96": ("Qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 96}),
    "qwen3 yarn, group 2, head 256": ("Qwen3", {"head_dim": 256, "rope_parameters": YARN}),
    "mistral, group 2, head 64": ("Mistral", {"head_dim": 64, "sliding_window": None}),
    "phi3, partial rotary": ("Phi3", {"hidden_size": 256, "rope_parameters": HALF_ROTARY}),
    "gemma2, sliding and full layers": ("Gemma2", HYBRID),
    "gpt-oss, attention sinks, sliding and full layers": (
        "GptOss", {
            "num_hidden_layers": 4, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    "gemma2, full layers first": ("Gemma2", HYBRID | {"layer_types": ["full_attention", "sliding_attention"] * 2}),
}  # fmt: skip


@pytest.fixture
def _experts_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes it with a process's first engine, if that has experts. On one rank all groups are alike."""
    if parallel_state._TP is not None and parallel_state._EP is None:
        monkeypatch.setattr(parallel_state, "_EP", parallel_state._TP)


@pytest.mark.usefixtures("_experts_group")
@pytest.mark.parametrize("name", MATRIX)
def test_greedy_tokens_equal_the_reference(
    engine: EngineFactory, prompts: list[list[int]], tmp_path: Path, name: str
) -> None:
    family, changes = MATRIX[name]
    sizes = SIZES | changes
    if family in ("Qwen2", "Phi3"):
        sizes.pop("head_dim")
    model_config = getattr(transformers, f"{family}Config")(**sizes)
    model, statistics = save_tiny_model(model_config, tmp_path / "model"), tmp_path / "statistics.safetensors"
    random_statistics(model_config, seed=1).save(statistics)
    config = CompressionConfig(budget=96, interval=64, window=16, statistics=statistics)
    llm = engine(config, model=model)
    ours = generate(llm, prompts[:2], TOKENS)

    reference = DenseReference(model, statistics)
    for prompt, tokens in zip(prompts[:2], ours, strict=True):
        expected, compactions = reference.generate(prompt, TOKENS, config, BLOCK, in_flight=0)
        assert compactions >= 3
        assert tokens == expected
    groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
    compacted = [group for group in groups if isinstance(group.kv_cache_spec, CompactedAttentionSpec)]
    layers = sorted(extract_layer_index(name) for group in compacted for name in group.layer_names)
    assert layers == reference.compacted_layers
    assert all(manager.compactions >= 6 for manager in scheduler_of(llm).compacted)
    assert_pool_whole(llm)
