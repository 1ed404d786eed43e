"""The Ray Serve deployment of one replica: one engine, its reports, its HTTP application.

Owns the life of the engine inside a Serve replica actor. Imports of vLLM stay inside, in `engine.py`, so that
the fleet can name this class without loading it.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.actor import ActorHandle
from starlette.types import ASGIApp

from replicas.gate import Gate, Page
from replicas.messages import CapacityReport, ReplicaLimits
from replicas.reporter import Reporter
from triattention.config import CompressionConfig

if TYPE_CHECKING:
    from replicas.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaOptions:
    """What one replica needs to know; the fleet's settings are translated into it in `deploy/`."""

    engine_arguments: dict[str, Any]
    """`vllm serve` arguments by their Python names."""
    compression: CompressionConfig | None
    heartbeat_seconds: float
    coordinator: tuple[str, str]
    """Name and namespace of the coordinator's actor."""


@serve.ingress()
class Replica:
    """One engine. Serve calls `__serve_build_asgi_app__` after the constructor and `check_health` while it lives."""

    async def __init__(self, options: ReplicaOptions) -> None:
        from replicas.engine import Engine

        self._coordinator_name = options.coordinator
        self._coordinator: ActorHandle[Any] | None = None
        # The engine's first report comes while it starts, before the reporter can know the model's length.
        first: list[dict[str, Any]] = []
        listener: Callable[[dict[str, Any]], None] = first.append
        self._engine: Engine = await Engine.start(
            options.engine_arguments, options.compression, lambda report: listener(report)
        )
        self._reporter = Reporter(
            replica=serve.get_replica_context().replica_id.unique_id,
            limits=ReplicaLimits(self._engine.max_model_len, options.compression),
            heartbeat_seconds=options.heartbeat_seconds,
            send=self._send,
        )
        listener = self._reporter.observe
        listener(first[-1])
        self._reports = asyncio.create_task(self._reporter.run())

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        pages = {
            "/metrics": Page("text/plain; version=0.0.4; charset=utf-8", lambda: self._ask("metrics")),
            "/fleet": Page("application/json", lambda: self._ask("status")),
        }
        return Gate(self._engine.app, self._reporter.finish, pages)

    async def check_health(self) -> None:
        """Raises if the engine is dead: Serve then replaces this replica."""
        await self._engine.check()

    async def __del__(self) -> None:
        # The constructor may have failed before there was anything to stop.
        if hasattr(self, "_reports"):
            self._reports.cancel()
        if hasattr(self, "_engine"):
            self._engine.stop()

    async def _send(self, report: CapacityReport) -> None:
        try:
            await self._resolve().report.remote(report)
        except ray.exceptions.RayActorError:
            self._coordinator = None
            raise

    async def _ask(self, method: str) -> bytes:
        answer: bytes = await getattr(self._resolve(), method).remote()
        return answer

    def _resolve(self) -> "ActorHandle[Any]":
        if self._coordinator is None:
            name, namespace = self._coordinator_name
            self._coordinator = ray.get_actor(name, namespace=namespace)
        return self._coordinator
