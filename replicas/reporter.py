"""Pushes one engine's capacity reports to the coordinator: on change and at a heartbeat, one in flight.

Owns sequence numbers and the mapping from vLLM's request ids back to reservations. Knows nothing of Ray: the
way to the coordinator is a coroutine function. Never blocks the engine's event loop.
"""

import asyncio
import contextlib
import logging
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from replicas.headers import reservation_of
from replicas.messages import CapacityReport, ReplicaLimits
from triattention.report import EngineReport

logger = logging.getLogger("ray.serve")

SHORTEST_INTERVAL_SECONDS = 0.05
SEND_TIMEOUT_SECONDS = 5.0

Send = Callable[[CapacityReport], Awaitable[None]]


class Reporter:
    def __init__(self, replica: str, limits: ReplicaLimits, heartbeat_seconds: float, send: Send) -> None:
        self._replica = replica
        self._limits = limits
        self._heartbeat_seconds = heartbeat_seconds
        self._send = send
        self._epoch = uuid.uuid4().hex
        self._sequence = 0
        self._engine: dict[str, Any] | None = None
        self._active: set[str] = set()
        self._finished: list[str] = []
        self._changed = asyncio.Event()
        self._reachable = True

    def observe(self, engine: dict[str, Any]) -> None:
        """Called by the engine's statistics tap after every step: must be cheap."""
        if engine != self._engine:
            self._engine = engine
            self._changed.set()

    def begin(self, reservation: str) -> None:
        """The request of this reservation is here: shown in every report, also while it holds no blocks yet."""
        self._active.add(reservation)
        self._changed.set()

    def finish(self, reservation: str) -> None:
        """It has ended, in whatever way."""
        self._active.discard(reservation)
        self._finished.append(reservation)
        self._changed.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._heartbeat_seconds)
            self._changed.clear()
            await self._report()
            await asyncio.sleep(SHORTEST_INTERVAL_SECONDS)

    async def _report(self) -> None:
        if self._engine is None:
            return
        finished = tuple(self._finished)
        self._sequence += 1
        engine = EngineReport.from_dict(self._engine)
        report = CapacityReport(
            replica=self._replica,
            epoch=self._epoch,
            sequence=self._sequence,
            limits=self._limits,
            engine=engine,
            held_blocks={**dict.fromkeys(self._active, 0), **held_by_reservation(engine.held_blocks)},
            finished=finished,
        )
        try:
            await asyncio.wait_for(self._send(report), SEND_TIMEOUT_SECONDS)
        except Exception as error:
            # Mostly the coordinator is away: requests still flow, and what ended is told again when it is back.
            if self._reachable:
                logger.warning("Capacity reports do not get through (%r); trying again.", error)
            self._reachable = False
            return
        self._reachable = True
        del self._finished[: len(finished)]


def held_by_reservation(held_blocks: Mapping[str, int]) -> dict[str, int]:
    """Blocks per reservation, all sequences of a request together."""
    held: defaultdict[str, int] = defaultdict(int)
    for request, blocks in held_blocks.items():
        if reservation := reservation_of(request):
            held[reservation] += blocks
    return dict(held)
