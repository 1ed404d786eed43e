"""The front end's side of the capacity reports."""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from triattention.report import REPORT_KEY, EngineReport


class EngineReportLogger(StatLoggerBase):
    """Hands each `EngineReport` to `on_report` and takes it out of vLLM's statistics again.

    vLLM's own loggers would read the report as a KV connector's statistics. Custom loggers run before them, in the
    order given, so this one must be among the `stat_loggers` of the engine.
    """

    def __init__(self, on_report: Callable[[EngineReport], None]) -> None:
        self.on_report = on_report

    def record(self, scheduler_stats: SchedulerStats | None, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is None or scheduler_stats.kv_connector_stats is None:
            return
        report = EngineReport.from_dict(scheduler_stats.kv_connector_stats[REPORT_KEY])
        scheduler_stats.kv_connector_stats = None
        self.on_report(report)

    def log_engine_initialized(self) -> None:
        pass

    @classmethod
    def factory(cls, on_report: Callable[[EngineReport], None]) -> Callable[[VllmConfig, int], StatLoggerBase]:
        """For `AsyncLLM.from_engine_args(stat_loggers=[EngineReportLogger.factory(callback)])`."""
        return lambda vllm_config, engine_index: cls(on_report)
