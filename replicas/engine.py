"""One vLLM engine behind vLLM's own OpenAI application. The only file that imports vLLM's front end.

Owns the engine's start, its statistics tap and its end. Knows nothing of Ray.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from prometheus_client import Metric, generate_latest
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry

from triattention.report import REPORT_KEY
from triattention.vllm import engine_arguments, on_this_machine

__all__ = ["Engine"]

Listener = Callable[[dict[str, Any]], None]
EndListener = Callable[[str, float], None]


class _ReportTap(StatLoggerBase):
    """Hands every engine report (`EngineReport` as a dict) to a listener, in the event loop of the engine."""

    def __init__(self, listener: Listener, on_end: EndListener) -> None:
        self._listener = listener
        self._on_end = on_end

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        for ended in iteration_stats.finished_requests if iteration_stats is not None else ():
            if ended.request_id is not None and ended.num_generation_tokens > 1:
                self._on_end(ended.request_id, ended.mean_time_per_output_token)
        if scheduler_stats is not None and scheduler_stats.kv_connector_stats is not None:
            self._listener(scheduler_stats.kv_connector_stats[REPORT_KEY])

    def log_engine_initialized(self) -> None:
        pass


class Engine:
    """A started AsyncLLM and the FastAPI application that answers for it."""

    def __init__(self, client: AsyncLLM, app: FastAPI, args: Namespace) -> None:
        self._client = client
        self.app = app
        self.cors = {
            "allow_origins": args.allowed_origins,
            "allow_credentials": args.allow_credentials,
            "allow_methods": args.allowed_methods,
            "allow_headers": args.allowed_headers,
        }
        """Of Starlette's CORSMiddleware, as vLLM has it on `app`."""

    @classmethod
    async def start(
        cls, arguments: dict[str, Any], compression: Any, listener: Listener, on_end: EndListener
    ) -> "Engine":
        """Start an engine from `vllm serve` arguments by their Python names.

        `listener` is called after every engine step, `on_end` with the request id and the mean seconds per output
        token of every sequence that ends. Raises ValueError for an argument that vLLM has not.
        """
        args = _serve_arguments({**on_this_machine(arguments), **engine_arguments(compression)})

        def tap(config: VllmConfig, index: int) -> StatLoggerBase:
            return _ReportTap(listener, on_end)

        # What the settings leave open is as in vLLM's own server: tokens of a step, for one, hang on it.
        client = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(args), usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=[tap]
        )
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        # vLLM's handler of a dead engine tells its own server to stop; here Ray Serve's health check does.
        app.state.server = SimpleNamespace()
        engine = cls(client, app, args)
        await engine._first_step()
        return engine

    async def _first_step(self) -> None:
        """One token, so that the first report exists before the first request and a broken engine never serves."""
        params = SamplingParams(max_tokens=1, temperature=0)
        async for _ in self._client.generate({"prompt_token_ids": [0]}, params, "first-step"):
            pass

    def metrics(self) -> str:
        """vLLM's own metrics in Prometheus' text format."""
        return generate_latest(get_prometheus_registry()).decode()

    def families(self) -> Iterator[Metric]:
        """The same, parsed; without what Python and the process say of themselves."""
        return (family for family in get_prometheus_registry().collect() if family.name.startswith("vllm:"))

    @property
    def is_dead(self) -> bool:
        return self._client.errored

    def check(self) -> None:
        """Raises `vllm.v1.engine.exceptions.EngineDeadError` if the engine is dead."""
        if self._client.errored:
            raise self._client.dead_error

    def stop(self) -> None:
        self._client.shutdown(timeout=5)


def _serve_arguments(values: dict[str, Any]) -> Namespace:
    """All of `vllm serve`'s arguments at their defaults, but for `values`."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    unknown = sorted(set(values) - set(vars(args)))
    if unknown:
        raise ValueError(f"vLLM has no argument {', '.join(unknown)}: correct engine.extra in the settings")
    vars(args).update(values)
    # vLLM's periodic log line and its default loggers stay off: the tap and Prometheus remain.
    args.disable_log_stats = True
    if isinstance(args.served_model_name, str):
        args.served_model_name = [args.served_model_name]
    return args
