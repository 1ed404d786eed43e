"""Variables of a process that runs an engine. Imports nothing: vLLM and torch read them when they are imported."""

import os


def engine_environment() -> dict[str, str]:
    """The worker runs in the engine's process, as in a replica of the fleet; vLLM's own log stays quiet."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # vLLM's default on a GPU is compiled at start by an nvcc, which few machines have. Who has one may choose it.
        "VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0"),
    }
