"""What the engine refuses at start, each with one sentence. Fail closed: nothing here is attempted and hoped for."""

from typing import Any

from vllm.config import VllmConfig

from triattention.config import CompressionConfig

CONFIG_KEY = "triattention"
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
REPORTS_KEY = "triattention_reports"


def compression_config(vllm_config: VllmConfig) -> CompressionConfig | None:
    """The validated settings in `additional_config["triattention"]`; None where they are absent or null.

    Raises ValueError (pydantic) where a setting is wrong.
    """
    settings: dict[str, Any] | None = additional_config(vllm_config).get(CONFIG_KEY)
    return None if settings is None else CompressionConfig.model_validate(settings)


def sends_reports(vllm_config: VllmConfig) -> bool:
    return bool(additional_config(vllm_config).get(REPORTS_KEY, False))


def additional_config(vllm_config: VllmConfig) -> dict[str, Any]:
    if not isinstance(vllm_config.additional_config, dict):
        raise ValueError("additional_config must be a JSON object to hold the triattention settings.")
    return vllm_config.additional_config


def check_supported(vllm_config: VllmConfig) -> None:
    """Raises ValueError with one sentence for the first setting that compaction cannot work with."""
    parallel = vllm_config.parallel_config
    refusals = {
        "speculative decoding (rejected draft tokens would have to be un-compacted)": (
            vllm_config.speculative_config is not None
        ),
        "a KV connector (it copies blocks by position)": vllm_config.kv_transfer_config is not None,
        "decode context parallelism (a block's tokens are spread over ranks)": (
            parallel.decode_context_parallel_size > 1
        ),
        "pipeline parallelism (scores of all layers are needed in one place)": (parallel.pipeline_parallel_size > 1),
        "multi-head latent attention (its cache holds no per-head keys)": vllm_config.model_config.use_mla,
        f"KV cache type {vllm_config.cache_config.cache_dtype} (only one number per token and dimension)": (
            vllm_config.cache_config.cache_dtype not in KV_CACHE_DTYPES
        ),
    }
    for what, present in refusals.items():
        if present:
            raise ValueError(
                f"KV compression does not support {what}: switch it off, or remove "
                f'"{CONFIG_KEY}" from additional_config.'
            )
