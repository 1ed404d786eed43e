"""The vLLM extension, and the only package that imports vLLM's internals.

`engine_arguments` is how a program starts an engine with compression; for `vllm serve` the same three values are
`--worker-cls`, `--scheduler-cls` and `--additional-config`.
"""

import multiprocessing
import os
import signal
import threading
from typing import Any

import torch

from triattention.config import CompressionConfig

_NOT_ALLOCATED = 1 << 28
"""Bytes of KV memory named beside a number of blocks, which is what counts then."""


def register() -> None:
    """Entry point of group `vllm.general_plugins`: vLLM calls it in every process that it starts."""
    import triattention.vllm.kv_manager  # noqa: F401  (registers the KV-cache spec on import)

    if multiprocessing.current_process().name.startswith("EngineCore"):  # as vLLM names the process of an engine
        threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    """An orphaned engine would keep the memory that the one in its place needs."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "vLLM starts engines as children"
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def engine_arguments(config: CompressionConfig | None) -> dict[str, Any]:
    """Keyword arguments for vLLM's `EngineArgs` or `AsyncEngineArgs`.

    With None nothing is compacted, and the scheduler only sends its reports. An `EngineReport` reaches the front end as
    a dict in `SchedulerStats.kv_connector_stats[REPORT_KEY]`, for a custom `StatLogger` to take. vLLM's own console
    logger would read it as a KV connector's, so such an engine needs `disable_log_stats` or a level of logging at
    which vLLM leaves that logger out.
    """
    arguments: dict[str, Any] = {
        "scheduler_cls": "triattention.vllm.scheduler.CompactionScheduler",
        "additional_config": {"triattention_reports": True},
    }
    if config is not None:
        arguments["worker_cls"] = "triattention.vllm.worker.CompactionWorker"
        arguments["additional_config"]["triattention"] = config.model_dump(mode="json")
    return arguments


def on_this_machine(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` of vLLM's `EngineArgs`, with what a CPU asks for where they leave it open.

    Dtype `auto` is vLLM's, the model's own, but float32 on a CPU that only emulates bf16: matrix products take some
    twenty times as long in it there. Where the number of KV blocks is given, vLLM does not size up the memory: a second
    engine would be refused for what the first one has taken.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return arguments
    own: dict[str, Any] = {}
    if arguments.get("dtype", "auto") == "auto" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        own["dtype"] = "float32"
    if "num_gpu_blocks_override" in arguments:
        own["kv_cache_memory_bytes"] = arguments.get("kv_cache_memory_bytes") or _NOT_ALLOCATED
    return {**arguments, **own}
