"""The coordinator actor: one process, one writer, around the plain admission code.

Owns the waiting futures, the clock, and the counts that the router brings; every decision is
`deploy.admission.Admission`'s.
"""

import asyncio
import time
from collections import Counter
from dataclasses import replace

from deploy.admission import Admission, FleetSnapshot
from deploy.messages import CapacityReport, Decision, Demand
from deploy.metrics import as_json, render
from deploy.settings import CoordinatorSettings

NAME = "coordinator"
NAMESPACE = "trifleet"

TICK_SECONDS = 0.1
# Serve replaces a replica that fails its health checks long before: one that is silent for so long is dead.
GONE_AFTER_SECONDS = 120.0
# The placement reason of requests that the router had to place while there was no coordinator.
WITHOUT_COORDINATOR = "without_coordinator"


class Coordinator:
    """An asyncio Ray actor: its methods interleave only at `await`, so the ledger has one writer.

    After a crash Ray starts it anew and empty; the replicas' next reports rebuild the ledger.
    """

    def __init__(self, settings: CoordinatorSettings, model: str) -> None:
        self._model = model
        self._admission = Admission(settings)
        self._waiting: dict[str, asyncio.Future[Decision]] = {}
        self._ticking: asyncio.Task[None] | None = None
        self._refused_by_router: Counter[str] = Counter()
        self._placed_by_router: Counter[str] = Counter()

    async def acquire(self, demand: Demand) -> Decision:
        """Decide now, or when it is decided: a queued demand waits at most for its deadline."""
        decision = self._admission.submit(demand, time.monotonic())
        if decision is not None:
            return decision
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waiting[demand.reservation] = future
        try:
            return await future
        except asyncio.CancelledError:
            await self.release(demand.reservation)
            raise
        finally:
            self._waiting.pop(demand.reservation, None)

    async def report(self, report: CapacityReport) -> None:
        self._start_ticking()
        self._deliver(self._admission.observe(report, time.monotonic()))

    async def release(self, reservation: str) -> None:
        self._deliver(self._admission.release(reservation, time.monotonic()))

    async def count_router(self, refused: Counter[str], placed: Counter[str]) -> bool:
        """What the router did by itself since it last told: refusals by reason, placements by replica."""
        self._refused_by_router += refused
        self._placed_by_router += placed
        return True

    async def metrics(self) -> bytes:
        """The fleet in Prometheus' text format."""
        return render(self._snapshot(), self._model)

    async def status(self) -> bytes:
        """The fleet as JSON."""
        return as_json(self._snapshot(), self._model)

    def _snapshot(self) -> FleetSnapshot:
        snapshot = self._admission.snapshot(time.monotonic())
        placements = {replica: dict(reasons) for replica, reasons in snapshot.placements.items()}
        for known in snapshot.replicas:
            if count := self._placed_by_router[known.replica]:
                placements.setdefault(known.replica, {})[WITHOUT_COORDINATOR] = count
        rejections = {**snapshot.rejections, **self._refused_by_router}
        return replace(snapshot, placements=placements, rejections=rejections)

    def _deliver(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            future = self._waiting.get(decision.reservation)
            if future is not None and not future.done():
                future.set_result(decision)

    def _start_ticking(self) -> None:
        """Begun by the first report: a Ray actor's constructor is no place to start a task."""
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._deliver(self._admission.tick(now))
            for replica in self._admission.silent(now, GONE_AFTER_SECONDS):
                self._deliver(self._admission.remove_replica(replica, now))
