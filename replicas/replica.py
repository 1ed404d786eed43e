"""The Ray Serve deployment of one replica: one engine, its reports, its HTTP application.

Owns the life of the engine inside a Serve replica actor. Imports of vLLM stay inside, in `engine.py`, so that
the fleet can name this class without loading it.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from replicas.access import Access
from replicas.door import Door
from replicas.exposition import merged
from replicas.fleet_page import fleet_page
from replicas.gate import Gate, Page
from replicas.gpu import GpuMeter
from replicas.limits import RequestLimits
from replicas.link import Address, Link
from replicas.messages import CapacityReport, ReplicaLimits
from replicas.ray_export import RayExport
from replicas.reporter import Reporter
from replicas.turnstile import Allowance
from triattention.config import CompressionConfig

if TYPE_CHECKING:
    from replicas.engine import EndListener, Engine, Listener

logger = logging.getLogger("ray.serve")

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
METRICS_TIMEOUT_SECONDS = 5.0
GPU_READ_SECONDS = 1.0


@dataclass(frozen=True)
class ReplicaOptions:
    """What one replica needs to know; the fleet's settings are translated into it in `deploy/`."""

    engine_arguments: dict[str, Any]
    """`vllm serve` arguments by their Python names, `max_model_len` among them."""
    compression: CompressionConfig | None
    heartbeat_seconds: float
    coordinator: tuple[str, str]
    """Name and namespace of the coordinator's actor."""
    access: Access
    limits: RequestLimits
    allowances: Mapping[str, Allowance]
    """By tier."""


@serve.ingress()
class Replica:
    """One engine: Serve awaits `__serve_build_asgi_app__` before the replica counts as running."""

    def __init__(self, options: ReplicaOptions) -> None:
        self._options = options
        self._link = Link(self._find_coordinator)
        self._engine: Engine | None = None
        self._reporter: Reporter | None = None
        self._reports: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []
        """What may fail without harm to requests."""

    async def _start_engine(self, listener: "Listener", on_end: "EndListener") -> "Engine":
        from replicas.engine import Engine

        return await Engine.start(self._options.engine_arguments, self._options.compression, listener, on_end)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        options = self._options
        reporter = self._reporter = Reporter(
            replica=serve.get_replica_context().replica_id.unique_id,
            limits=ReplicaLimits(options.engine_arguments["max_model_len"], options.compression),
            heartbeat_seconds=options.heartbeat_seconds,
            send=self._send,
            node=ray.get_runtime_context().get_node_id(),
        )
        self._engine = await self._start_engine(reporter.observe, reporter.decoded)
        self._reports = asyncio.create_task(reporter.run())
        self._background = [asyncio.create_task(RayExport(self._engine.families, {"replica": reporter.replica}).run())]
        if meter := GpuMeter.open(os.environ):
            self._background.append(asyncio.create_task(_read_gpus(meter, reporter)))
        pages = {
            "/metrics": Page(PROMETHEUS, lambda: self._ask("metrics")),
            # A page of its own: it waits for every engine's event loop, which the fleet's own metrics must not.
            "/metrics/engines": Page(PROMETHEUS, self._all_engines_metrics),
            "/fleet": Page("application/json", lambda: self._ask("status"), fleet_page),
        }
        started = self._engine
        gate = Gate(started.app, reporter, pages, lambda: started.is_dead)
        door = Door(gate, options.access, options.limits, options.allowances, reporter)
        # Around the door, so that a browser's question has no key to show and a page can read a refusal.
        return CORSMiddleware(door, **started.cors)

    async def check_health(self) -> None:
        """Raises if the engine is dead or nothing is reported any more: Serve then replaces this replica."""
        if self._engine is not None:
            self._engine.check()
        if self._reports is not None and self._reports.done():
            self._reports.result()

    async def __del__(self) -> None:
        if self._reports is not None:
            self._reports.cancel()
        for task in self._background:
            task.cancel()
        if self._engine is not None:
            self._engine.stop()

    def probe(self, replica: str) -> CapacityReport | None:
        """A report, asked for because none came of `replica`; None where this is another one or has none yet."""
        if self._engine is None or self._reporter is None or replica != self._reporter.replica:
            return None
        self._engine.check()
        return self._reporter.report()

    def engine_metrics(self) -> tuple[str, str]:
        """This replica's id and vLLM's own metrics; called by the replica that is asked for all of them."""
        assert self._engine is not None
        return serve.get_replica_context().replica_id.unique_id, self._engine.metrics()

    async def _all_engines_metrics(self) -> bytes:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        pages = await handle.broadcast("engine_metrics").results_async(timeout_s=METRICS_TIMEOUT_SECONDS)
        return merged(dict(pages), "vllm:").encode()

    async def _send(self, report: CapacityReport) -> None:
        # A dead engine falls silent, so that the coordinator places nothing more on it while Serve replaces it.
        await self.check_health()
        await self._link.call(None, "report", report)

    async def _ask(self, method: str) -> bytes:
        answer: bytes = await self._link.call(bytes, method)
        return answer

    async def _find_coordinator(self) -> Address:
        name, namespace = self._options.coordinator
        address: Address = await ray.get_actor(name, namespace=namespace).address.remote()
        return address


async def _read_gpus(meter: GpuMeter, reporter: Reporter) -> None:
    """Every second, off the event loop, until cancelled."""
    while True:
        reporter.gpu = await asyncio.to_thread(meter.read)
        await asyncio.sleep(GPU_READ_SECONDS)
