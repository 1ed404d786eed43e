"""The vLLM extension, and the only package that imports vLLM's internals.

`engine_arguments` is how a program starts an engine with compression; for `vllm serve` the same three values are
`--worker-cls`, `--scheduler-cls` and `--additional-config`.
"""

import multiprocessing
import os
import signal
import threading
from typing import Any

from triattention.config import CompressionConfig


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
    logger would read it as a KV connector's, so such an engine needs `disable_log_stats`.
    """
    arguments: dict[str, Any] = {
        "scheduler_cls": "triattention.vllm.scheduler.CompactionScheduler",
        "additional_config": {"triattention_reports": True},
    }
    if config is not None:
        arguments["worker_cls"] = "triattention.vllm.worker.CompactionWorker"
        arguments["additional_config"]["triattention"] = config.model_dump(mode="json")
    return arguments
