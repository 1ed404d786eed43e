"""What cannot be compressed is refused at start, in one sentence that names it: against vLLM's own config objects."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import DeepseekV2Config, FalconConfig
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.executor import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from tests.engine.conftest import SIZES, save_tiny_model
from tests.unit.tiny_models import random_statistics
from triattention.config import CompressionConfig
from triattention.rope import read_config
from triattention.vllm import engine_arguments
from triattention.vllm.cpu import CPUCompactionWorker
from triattention.vllm.kv_manager import CompactedAttentionSpec, compacted_specs
from triattention.vllm.support import check_policy, check_supported, refusals

RANDOM = CompressionConfig(budget=256, window=64, policy="random")


def vllm_config(model: Path, config: CompressionConfig = RANDOM, **arguments: Any) -> VllmConfig:
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, **arguments}
    return EngineArgs(str(model), **settings, **engine_arguments(config)).create_engine_config()


def save_mla_model(path: Path) -> Path:
    """A DeepSeek-V2 of one dense kind of layers."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
    config = DeepseekV2Config(
        **sizes, num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, first_k_dense_replace=3,
    )  # fmt: skip
    return save_tiny_model(config, path)


@pytest.fixture(scope="module")
def mla_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mla_model(tmp_path_factory.mktemp("mla") / "model")


SETTINGS: dict[str, dict[str, Any]] = {
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    },
    "a diffusion model": {"diffusion_config": {"canvas_length": 16}},
    "a KV connector": {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
    "decode context parallelism": {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
    "pipeline parallelism": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_compaction_cannot_work_with(tiny_model: Path, name: str) -> None:
    config = vllm_config(tiny_model, **SETTINGS[name])
    [sentence] = refusals(config)
    assert sentence.startswith(f"KV compression does not support {name} (")
    assert sentence.endswith('switch it off, or remove "triattention" from additional_config.')
    with pytest.raises(ValueError, match=f"does not support {name}"):
        check_supported(config)


class ExecutorOfSomeone(Executor): ...


def test_growth_cannot_be_reserved_where_vllm_does_not_ask(tiny_model: Path) -> None:
    unasked = {"scheduler_reserve_full_isl": False}
    [sentence] = refusals(vllm_config(tiny_model, **unasked))
    assert sentence.startswith("reserve_growth is true but scheduler_reserve_full_isl is False")
    check_supported(vllm_config(tiny_model, RANDOM.model_copy(update={"reserve_growth": False}), **unasked))


def test_an_executor_that_runs_the_model_past_the_worker(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_config(tiny_model)
    config.parallel_config.distributed_executor_backend = "ray"
    check_supported(config)
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    [sentence] = refusals(config)
    assert sentence.startswith("KV compression does not support the executor RayDistributedExecutor (")
    assert "unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND" in sentence
    config.parallel_config.distributed_executor_backend = ExecutorOfSomeone
    assert "does not support the executor ExecutorOfSomeone" in refusals(config)[0]
    config.parallel_config.distributed_executor_backend = "external_launcher"
    check_supported(config)


def test_multi_head_latent_attention(mla_model: Path) -> None:
    [sentence] = refusals(vllm_config(mla_model))
    assert "does not support multi-head latent attention (its cache holds no per-head keys)" in sentence


def test_distances_that_are_counted_in_slots(tmp_path: Path) -> None:
    model = tmp_path / "model"
    FalconConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ).save_pretrained(model)
    [sentence] = refusals(vllm_config(model, skip_tokenizer_init=True))
    assert "does not support ALiBi (its distances are counted in slots" in sentence


def test_an_ordinary_engine_is_not_refused(tiny_model: Path) -> None:
    check_supported(vllm_config(tiny_model))


def test_a_real_start_ends_with_the_sentence(mla_model: Path) -> None:
    """The refusal comes before anything is loaded, and is what the caller gets."""
    from vllm import LLM

    arguments = engine_arguments(RANDOM)
    with pytest.raises(ValueError, match="KV compression does not support multi-head latent attention"):
        LLM(str(mla_model), max_model_len=1024, enforce_eager=True, kv_cache_memory_bytes=1 << 26, **arguments)


class WorkerOfVLLMsOwnBuilder(CPUCompactionWorker):
    """As on an attention backend that we have no builder for."""

    backends: ClassVar = {AttentionBackendEnum.CPU_ATTN: CPUAttentionBackend}


def test_an_attention_backend_whose_metadata_nobody_squeezes(tiny_model: Path) -> None:
    from vllm import LLM

    arguments = engine_arguments(RANDOM) | {"worker_cls": f"{__name__}.WorkerOfVLLMsOwnBuilder"}
    with pytest.raises(ValueError, match="does not know the attention backend CPU_ATTN: set attention_backend to"):
        LLM(
            str(tiny_model),
            max_model_len=1024,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 26,
            num_gpu_blocks_override=64,
            skip_tokenizer_init=True,
            **arguments,
        )


def test_an_unknown_policy_and_statistics_of_another_model_before_any_weights(
    tiny_model: Path, mla_model: Path, tmp_path: Path
) -> None:
    config = vllm_config(tiny_model)
    with pytest.raises(ValueError, match=r'policy is "h2o", which is not registered: use one of key_norm, keydiff'):
        check_policy(RANDOM.model_copy(update={"policy": "h2o"}), config)
    statistics = random_statistics(read_config(tiny_model))
    statistics.save(tmp_path / "good")
    good = RANDOM.model_copy(update={"policy": "triattention", "statistics": tmp_path / "good"})
    check_policy(good, config)
    facts = statistics.facts | {"vocab_size": 7}
    replace(statistics, facts=facts).save(tmp_path / "other")
    with pytest.raises(ValueError, match="vocab_size 7 but this model has 512"):
        check_policy(good.model_copy(update={"statistics": tmp_path / "other"}), config)


FULL = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
SLIDING = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64)


def test_pages_of_several_sizes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM

    spec_of = Attention.get_kv_cache_spec

    def padded(self: Attention, config: VllmConfig) -> FullAttentionSpec:
        spec = spec_of(self, config)
        return replace(spec, page_size_padded=2 * spec.page_size_bytes) if "layers.0." in self.layer_name else spec

    monkeypatch.setattr(Attention, "get_kv_cache_spec", padded)
    with pytest.raises(ValueError, match=r"needs pages of one size, but .* have pages of \d+ and \d+ bytes"):
        LLM(
            str(tiny_model),
            max_model_len=1024,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 26,
            skip_tokenizer_init=True,
            **engine_arguments(RANDOM),
        )


def test_sliding_layers_that_are_to_be_kept_whole(tiny_model: Path) -> None:
    config = vllm_config(tiny_model, disable_hybrid_kv_cache_manager=True)
    compacted_specs({"a": FULL}, RANDOM, config)
    with pytest.raises(ValueError, match=r"disable_hybrid_kv_cache_manager is True, but layer b is SlidingWindowSpec"):
        compacted_specs({"a": FULL, "b": SLIDING}, RANDOM, config)


def test_only_full_attention_layers_are_compacted(tiny_model: Path) -> None:
    config = vllm_config(tiny_model)
    specs = compacted_specs({"a": FULL, "b": SLIDING}, RANDOM, config)
    assert type(specs["a"]) is CompactedAttentionSpec
    assert specs["b"] is SLIDING


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ({"a": replace(FULL, sliding_window=64)}, "FullAttentionSpec of layer a"),
        (
            {"a": FULL, "b": MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=80, dtype=torch.float32)},
            "MLAAttentionSpec of layer b",
        ),
        ({"b": SLIDING}, "found no full-attention layer"),
        ({}, "found no full-attention layer"),
    ],
)
def test_layers_that_cannot_be_compacted(tiny_model: Path, specs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        compacted_specs(specs, RANDOM, vllm_config(tiny_model))
