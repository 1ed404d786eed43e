"""What the engine refuses at start, each with one sentence. Fail closed: nothing here is attempted and hoped for."""

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from triattention.config import CompressionConfig
from triattention.policies import policy_names
from triattention.statistics import QueryStatistics

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
    """Raises ValueError with the first sentence of `refusals`."""
    for sentence in refusals(vllm_config):
        raise ValueError(sentence)


def refusals(vllm_config: VllmConfig) -> list[str]:
    """One sentence for every setting that compaction cannot work with."""
    parallel = vllm_config.parallel_config
    known = {
        "speculative decoding (rejected draft tokens would have to be un-compacted)": (
            vllm_config.speculative_config is not None
        ),
        "a diffusion model (tokens of its canvas are computed again)": vllm_config.diffusion_config is not None,
        "a KV connector (it copies blocks by position)": vllm_config.kv_transfer_config is not None,
        "decode context parallelism (a block's tokens are spread over ranks)": (
            parallel.decode_context_parallel_size > 1
        ),
        "pipeline parallelism (scores of all layers are needed in one place)": (parallel.pipeline_parallel_size > 1),
        "multi-head latent attention (its cache holds no per-head keys)": vllm_config.model_config.use_mla,
        "ALiBi (its distances are counted in slots, of which compaction takes some away)": (
            vllm_config.model_config.uses_alibi
        ),
        f"KV cache type {vllm_config.cache_config.cache_dtype} (only one number per token and dimension)": (
            vllm_config.cache_config.cache_dtype not in KV_CACHE_DTYPES
        ),
    }
    sentences = [
        f'KV compression does not support {what}: switch it off, or remove "{CONFIG_KEY}" from additional_config.'
        for what, present in known.items()
        if present
    ]
    executor = Executor.get_class(vllm_config)
    # The executor that vLLM takes for Ray by default is a MultiprocExecutor.
    if not issubclass(executor, MultiprocExecutor | UniProcExecutor):
        sentences.append(
            f"KV compression does not support the executor {executor.__name__} (it may run the model past the worker, "
            "which carries out compactions first): set distributed_executor_backend to mp, or to ray and unset "
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND."
        )
    config = compression_config(vllm_config)
    if config is not None and config.reserve_growth and not vllm_config.scheduler_config.scheduler_reserve_full_isl:
        sentences.append(
            "reserve_growth is true but scheduler_reserve_full_isl is False, and then vLLM admits requests without "
            "asking what they need: leave scheduler_reserve_full_isl at True, or set reserve_growth to false."
        )
    return sentences


def check_policy(config: CompressionConfig, vllm_config: VllmConfig) -> None:
    """Refuses, before any weights are loaded, a policy that nobody registered and statistics of another model.

    Which layers the statistics must hold is checked again where the layers are known. Raises ValueError.
    """
    if config.policy not in policy_names():
        raise ValueError(
            f'policy is "{config.policy}", which is not registered: use one of {", ".join(policy_names())}'
        )
    if isinstance(config.statistics, Path):
        QueryStatistics.load(config.statistics, vllm_config.model_config.hf_text_config, layers=())
