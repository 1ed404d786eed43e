"""The coordinator actor: one process, one writer, around the plain admission code.

Owns the waiting futures and the clock; every decision is `deploy.admission.Admission`'s.
"""

import asyncio
import json
import time
from dataclasses import asdict

from deploy.admission import Admission
from deploy.messages import CapacityReport, Decision, Demand
from deploy.settings import CoordinatorSettings

NAME = "coordinator"
NAMESPACE = "trifleet"
TICK_SECONDS = 0.1
# Serve replaces a replica that fails its health checks long before: one that is silent for so long is dead.
GONE_AFTER_SECONDS = 120.0


class Coordinator:
    """An asyncio Ray actor: its methods interleave only at `await`, so the ledger has one writer.

    After a crash Ray starts it anew and empty; the replicas' next reports rebuild the ledger.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._admission = Admission(settings)
        self._waiting: dict[str, asyncio.Future[Decision]] = {}
        self._ticking: asyncio.Task[None] | None = None

    async def acquire(self, demand: Demand) -> Decision:
        """Decide now or when it is decided: a queued demand waits at most for its deadline."""
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

    async def metrics(self) -> bytes:
        from deploy.metrics import render

        return render(self._admission.snapshot(time.monotonic()))

    async def status(self) -> bytes:
        return json.dumps(asdict(self._admission.snapshot(time.monotonic()))).encode()

    def _deliver(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            future = self._waiting.get(decision.reservation)
            if future is not None and not future.done():
                future.set_result(decision)

    def _start_ticking(self) -> None:
        """Started by the first report, because a Ray actor's constructor runs outside its event loop."""
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._deliver(self._admission.tick(now))
            for replica in self._admission.snapshot(now).replicas:
                if replica.report_age_seconds > GONE_AFTER_SECONDS:
                    self._deliver(self._admission.remove_replica(replica.replica, now))
