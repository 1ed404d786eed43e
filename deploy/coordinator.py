"""The coordinator actor: one process, one writer, around the plain admission code.

Owns the waiting futures, the clock, and the counts that the router brings; every decision is
`deploy.admission.Admission`'s.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ray.util import get_node_ip_address

from deploy.admission import Admission
from deploy.exposition import FleetCollector, as_json, render
from deploy.listener import Calls, Listener
from deploy.messages import CapacityReport, Decision, DecisionPair, Demand, FleetLoad, Placement
from deploy.reachable import Reachable
from deploy.settings import CoordinatorSettings
from deploy.snapshot import FleetSnapshot
from deploy.tiers import Tier
from replicas.access import DEFAULT_TIER
from replicas.link import Address
from replicas.ray_export import RayExport
from replicas.reporter import SHORTEST_INTERVAL_SECONDS

logger = logging.getLogger("ray.serve")

NAME = "coordinator"
NAMESPACE = "trifleet"

TICK_SECONDS = 0.1
STOOD_STILL_SECONDS = 0.5
# Serve replaces a replica that fails its health checks long before: one that is silent for so long is dead.
GONE_AFTER_SECONDS = 120.0
# The placement reason of requests that the router had to place while there was no coordinator.
WITHOUT_COORDINATOR = "without_coordinator"


class Coordinator:
    """An asyncio Ray actor: its methods interleave only at `await`, so the ledger has one writer.

    After a crash Ray starts it anew and empty; the replicas' next reports rebuild the ledger.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        model: str,
        tiers: Mapping[str, Tier] | None = None,
        wanted_replicas: int = 0,
    ) -> None:
        self._model = model
        self._tiers = dict(tiers or {})
        self._made_with = (settings, model, self._tiers, wanted_replicas)
        self._admission = Admission(settings, tiers=self._tiers)
        self._wanted_replicas = wanted_replicas
        self._started_at = time.time()
        self._probes = 0
        self._waiting: dict[str, asyncio.Future[Decision]] = {}
        self._ticking: asyncio.Task[None] | None = None
        self._exporting: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[Address] | None = None
        self._refused_by_router: Counter[tuple[str, str]] = Counter()
        """By tier and reason."""
        self._placed_by_router: Counter[str] = Counter()
        self._reachable = Reachable()

    async def runs_with(
        self, settings: CoordinatorSettings, model: str, tiers: Mapping[str, Tier], wanted_replicas: int
    ) -> bool:
        return self._made_with == (settings, model, dict(tiers), wanted_replicas)

    async def address(self) -> Address:
        """Where routers and replicas reach it (`replicas.link`)."""
        self._start_ticking()
        if self._listening is None:
            calls: Calls = {
                "acquire": (tuple[Demand, str | None], self._acquire),
                "report": (tuple[CapacityReport], self.report),
                "release": (tuple[str], self.release),
                "listed": (tuple[str, frozenset[str] | None], self.listed),
                "count_router": (tuple[dict[tuple[str, str], int], dict[str, int]], self.count_router),
                "metrics": (tuple[()], self.metrics),
                "status": (tuple[()], self.status),
            }
            self._listening = asyncio.create_task(Listener(calls).start(get_node_ip_address()))
        try:
            return await self._listening
        except OSError:
            self._listening = None  # no port was free: the next caller tries again
            raise

    async def _acquire(self, demand: Demand, failed: str | None) -> DecisionPair:
        decision = await self.acquire(demand, failed)
        return (decision, None) if isinstance(decision, Placement) else (None, decision)

    async def acquire(self, demand: Demand, failed: str | None = None) -> Decision:
        """Decide now, or when it is decided: a queued demand waits at most for its deadline.

        `failed`: the reservation under which a replica failed this request before it answered anything.
        """
        demand = replace(demand, tier=self._known(demand.tier))
        if self._admission.has_too_many(demand):
            # Its last one may have ended just now: the next report tells.
            await asyncio.sleep(2 * SHORTEST_INTERVAL_SECONDS)
        now = time.monotonic()
        if failed is not None:
            demand = self._admission.failed(failed, demand, now)
        decision = self._admission.submit(demand, now)
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
        self._deliver(self._admission.observe(report, time.monotonic()))

    async def release(self, reservation: str) -> None:
        """Ends a request, placed or queued; the call that waits for a queued one's decision is cancelled."""
        self._deliver(self._admission.release(reservation, time.monotonic()))
        if (waiting := self._waiting.get(reservation)) is not None:
            waiting.cancel()

    async def count_router(self, refused: Mapping[tuple[str, str], int], placed: Mapping[str, int]) -> bool:
        """What the router did by itself since it last told: refusals by tier and reason, placements by replica."""
        for (tier, reason), count in refused.items():
            self._refused_by_router[self._known(tier), reason] += count
        self._placed_by_router.update(placed)
        return True

    async def listed(self, router: str, replicas: frozenset[str] | None) -> list[str] | None:
        """A router tells where requests reach a replica, or with None that this has not changed; it should
        ask those returned to report: they are silent. Returns None where it has to tell anew: after a restart."""
        now = time.monotonic()
        before = self._reachable.by_all
        if not self._reachable.hear(router, replicas, now):
            return None
        by_all = self._reachable.by_all
        if by_all is not None and by_all != before:
            self._deliver(self._admission.set_listed(by_all, now))
        stale = self._admission.stale(now)
        self._probes += len(stale)
        return stale

    async def load(self, wanted_replicas: int) -> FleetLoad:
        """For autoscaling, which tells how many replicas it last asked for."""
        self._wanted_replicas = wanted_replicas
        return self._admission.load(time.monotonic())

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
            # Also 0: a series that begins with its first placements hides their rate.
            placements.setdefault(known.replica, {})[WITHOUT_COORDINATOR] = self._placed_by_router[known.replica]
        rejections = dict(snapshot.rejections)
        for (tier, reason), count in self._refused_by_router.items():
            rejections[reason] = rejections.get(reason, 0) + count
            of_tier = snapshot.tiers[tier].counts.rejections
            of_tier[reason] = of_tier.get(reason, 0) + count
        return replace(
            snapshot,
            placements=placements,
            rejections=rejections,
            wanted_replicas=self._wanted_replicas,
            probes=self._probes,
            started_at=self._started_at,
        )

    def _known(self, tier: str) -> str:
        """A router that still runs with former settings may name a tier that is no more."""
        return tier if tier in self._tiers else DEFAULT_TIER

    def _deliver(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            future = self._waiting.get(decision.reservation)
            if future is not None and not future.done():
                future.set_result(decision)

    def _start_ticking(self) -> None:
        """Begun by the first who asks where it is: a Ray actor's constructor is no place to start a task."""
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())
            self._ticking.add_done_callback(_end_if_failed)
            export = RayExport(FleetCollector(self._model, self._snapshot).collect)
            self._exporting = asyncio.create_task(export.run())

    async def _tick(self) -> None:
        is_late = False
        while True:
            began = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            # This process stood still: what others sent meanwhile is heard before anyone counts as silent.
            is_late = not is_late and now - began > STOOD_STILL_SECONDS
            if is_late:
                continue
            self._deliver(self._admission.tick(now))
            for replica in self._admission.gone(now, GONE_AFTER_SECONDS):
                self._deliver(self._admission.remove_replica(replica, now))


def _end_if_failed(ticking: asyncio.Task[None]) -> None:
    """Without its clock no lease and no wait would ever end, and nobody would notice. Ray starts a new coordinator."""
    if not ticking.cancelled() and (failure := ticking.exception()) is not None:
        logger.critical("The coordinator's clock has failed, so it ends and is started anew.", exc_info=failure)
        os._exit(1)
