"""RoPE parameters read from a config do what the model's own tables and its own rotation do."""

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GlmConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from tests.unit.tiny_models import SIZES, llama, qwen3, yarn
from triattention.rope import RopeParameters, find_rotary, find_rotation_module

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
NO_GROUPS = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}

CONFIGS = {
    "llama": llama(),
    "llama3 scaling": llama(rope_parameters=LLAMA3, head_dim=128),
    "linear scaling": llama(rope_parameters=LINEAR),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": qwen3(),
    "qwen3 yarn": yarn(head_dim=64),
    "mistral": MistralConfig(**SIZES),
    "phi3 partial rotary": Phi3Config(**SIZES, rope_parameters=PARTIAL),
    "glm interleaved partial rotary": GlmConfig(**SIZES, head_dim=16, rope_parameters=PARTIAL),
    "cohere interleaved": CohereConfig(**SIZES),
    "gpt-oss, tables of half a head": GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
    "gpt-neox partial rotary": GPTNeoXConfig(**NO_GROUPS),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_rotates_whole_heads_as_the_model_does(config: PreTrainedConfig) -> None:
    rope = RopeParameters.from_config(config)
    model = AutoModelForCausalLM.from_config(config)
    positions = torch.arange(0, 4000, 37)
    heads = torch.randn(1, 2, len(positions), rope.head_dim)
    cos, sin = find_rotary(model)(heads, positions[None])
    expected, _ = find_rotation_module(model).apply_rotary_pos_emb(heads, heads, cos, sin)
    torch.testing.assert_close(rope.rotate(heads, positions).float(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_real_part_of_the_band_product_is_the_dot_product_of_heads(config: PreTrainedConfig) -> None:
    rope = RopeParameters.from_config(config)
    q, k = torch.randn(2, 5, rope.head_dim, dtype=torch.float64)
    bands = (rope.as_complex(q) * rope.as_complex(k).conj()).real.sum(-1)
    torch.testing.assert_close(bands, (q * k).sum(-1))
    torch.testing.assert_close(rope.as_heads(rope.as_complex(q)), q)


def test_default_frequencies_follow_theta() -> None:
    rope = RopeParameters.from_config(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    expected = [5e5 ** (-2 * f / 16) for f in range(8)]
    assert rope.inv_freq == pytest.approx(expected, rel=1e-6)
    assert (rope.style, rope.rotary_dim, rope.bands, rope.attention_scaling) == ("neox", 16, 8, 1.0)


def test_llama3_scaling_slows_the_lowest_band_by_its_factor_and_leaves_the_highest() -> None:
    rope = RopeParameters.from_config(CONFIGS["llama3 scaling"])
    assert rope.inv_freq[0] == pytest.approx(1.0)
    assert rope.inv_freq[-1] == pytest.approx(500000.0 ** (-126 / 128) / 8, rel=1e-5)


def test_yarn_scales_attention_by_its_published_rule() -> None:
    rope = RopeParameters.from_config(CONFIGS["qwen3 yarn"])
    assert rope.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert rope.scales().tolist() == [rope.attention_scaling] * 32


def test_partial_rotary_leaves_the_tail_at_frequency_zero_and_scale_one() -> None:
    rope = RopeParameters.from_config(CONFIGS["phi3 partial rotary"])
    assert (rope.head_dim, rope.rotary_dim, rope.style) == (8, 4, "neox")
    assert rope.frequencies()[2:].tolist() == [0.0, 0.0]
    heads = torch.randn(3, 8)
    assert torch.equal(rope.rotate(heads, torch.tensor([5, 50, 500]))[:, 4:], heads[:, 4:].double())


def test_interleaved_models_are_recognised() -> None:
    assert RopeParameters.from_config(CONFIGS["cohere interleaved"]).style == "gptj"
    assert RopeParameters.from_config(CONFIGS["glm interleaved partial rotary"]).style == "gptj"


def test_plain_form_reads_back_exactly_through_json() -> None:
    rope = RopeParameters.from_config(CONFIGS["qwen3 yarn"])
    assert RopeParameters.from_plain(json.loads(json.dumps(rope.plain()))) == rope


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
REFUSED = {
    "different tables": Gemma3TextConfig(**SIZES, head_dim=16),
    "change with the length": llama(rope_parameters=DYNAMIC),
    "exactly one": GPTJConfig(n_layer=2, n_embd=32, n_head=2, rotary_dim=8),
}


@pytest.mark.parametrize(("reason", "config"), REFUSED.items(), ids=REFUSED.keys())
def test_refuses_models_without_one_fixed_table(reason: str, config: PreTrainedConfig) -> None:
    with pytest.raises(ValueError, match=reason):
        RopeParameters.from_config(config)
