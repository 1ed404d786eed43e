"""How fast the coordinator decides, and how old its knowledge is: the real actor and Ray, fake engines.

One process plays eight replicas (the real `Reporter`, engines that only count) and the router, each with its own
`Link`; the coordinator is an actor in its own process, as in a fleet. First requests come at a steady rate, which gives
the latency of one decision and the age of the report that it was made on; then as many as can be, which gives the rate.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from statistics import quantiles
from typing import Any

import ray
import uvloop
from ray.actor import ActorHandle

from benchmarks.machine import machine
from deploy.app import coordinator_options
from deploy.coordinator import Coordinator
from deploy.messages import Decision, DecisionPair, Demand, Placement
from deploy.settings import CoordinatorSettings
from replicas.headers import new_reservation
from replicas.link import Address, Link
from replicas.messages import CapacityReport, ReplicaLimits
from replicas.reporter import Reporter
from triattention.report import EngineReport

REPLICAS = 8
BLOCKS, BLOCK = 4000, 16
HELD_BLOCKS = 10
# Steady: a busy fleet of eight. Each request stays for about as long as a short answer takes.
STEADY_PER_SECOND = 200
REQUEST_SECONDS = 0.5
IN_FLIGHT = 64
STEP_SECONDS = 0.02
"""Between two reports of a fake engine to its front end."""


class MeasuredCoordinator(Coordinator):
    """Also notes how old the report was on which each placement was decided."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        super().__init__(settings, "bench")
        self._ages: list[float] = []

    async def acquire(self, demand: Demand, failed: str | None = None) -> Decision:
        decision = await super().acquire(demand, failed)
        if isinstance(decision, Placement):
            self._ages.append(self._admission.report_age(decision.replica, time.monotonic()))
        return decision

    async def take_ages(self) -> list[float]:
        ages, self._ages = self._ages, []
        return ages


class FakeReplica:
    """The real reporter before an engine that holds some blocks for each request and computes nothing."""

    def __init__(self, name: str, link: Link) -> None:
        async def send(report: CapacityReport) -> None:
            await link.call(None, "report", report)

        self._reporter = Reporter(name, ReplicaLimits(32_768, None), 0.2, send)
        self._held: dict[str, int] = {}
        self._ended: dict[str, tuple[int, int]] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reporter.run())
            group.create_task(self._steps())

    async def _steps(self) -> None:
        while True:
            ended, self._ended = self._ended, {}
            report = EngineReport(
                block_size=BLOCK,
                bytes_per_block=1,
                total_blocks=BLOCKS,
                free_blocks=BLOCKS - sum(self._held.values()),
                running=len(self._held),
                waiting=0,
                in_flight_tokens=2,
                held_blocks=dict(self._held),
                ended=ended,
            )
            self._reporter.observe(report.to_dict())
            await asyncio.sleep(STEP_SECONDS)

    async def serve(self, reservation: str, seconds: float) -> None:
        request = f"cmpl-{reservation}-0-0a1b2c3d"
        self._reporter.begin(reservation, "default", "short", 0.0)
        self._held[request] = HELD_BLOCKS
        await asyncio.sleep(seconds)
        del self._held[request]
        self._ended[request] = (100, 60)
        self._reporter.finish(reservation)


def bench_router(seconds: float = 10.0) -> dict[str, Any]:
    """Figures of one run; `seconds` for each of its two parts."""
    about = machine("ray")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=128 * 1024 * 1024,
    )
    try:
        coordinator = ray.remote(MeasuredCoordinator).options(**coordinator_options()).remote(CoordinatorSettings())
        # The router of a fleet runs on uvloop too: Ray Serve's processes do.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return about | runner.run(_measure(coordinator, seconds))
    finally:
        ray.shutdown()


async def _measure(coordinator: "ActorHandle[Any]", seconds: float) -> dict[str, Any]:
    async def find() -> Address:
        address: Address = await coordinator.address.remote()
        return address

    names = [f"fake-{number}" for number in range(REPLICAS)]
    replicas = {name: FakeReplica(name, Link(find)) for name in names}
    link = Link(find)
    running = [asyncio.create_task(replica.run()) for replica in replicas.values()]
    rng = random.Random(0)
    serving: set[asyncio.Task[None]] = set()
    latencies: list[float] = []

    async def one_request() -> None:
        demand = Demand(new_reservation(), prompt_tokens=100, total_tokens=160)
        began = time.perf_counter()
        decision, refusal = await link.call(DecisionPair, "acquire", demand, None)
        latencies.append(time.perf_counter() - began)
        if decision is None:
            raise RuntimeError(f"The bench's own fleet refused a request: {refusal}")
        seconds = rng.expovariate(1 / REQUEST_SECONDS)
        task = asyncio.create_task(replicas[decision.replica].serve(demand.reservation, seconds))
        serving.add(task)
        task.add_done_callback(serving.discard)

    async def part(load: Callable[[], Awaitable[None]]) -> tuple[list[float], list[float], float]:
        latencies.clear()
        await coordinator.take_ages.remote()
        began = time.perf_counter()
        await load()
        return list(latencies), await coordinator.take_ages.remote(), time.perf_counter() - began

    async def steady() -> None:
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(int(STEADY_PER_SECOND * seconds)):
                due += rng.expovariate(STEADY_PER_SECOND)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(one_request())

    async def as_many_as_can_be() -> None:
        until = time.perf_counter() + seconds

        async def again_and_again() -> None:
            while time.perf_counter() < until:
                await one_request()

        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(again_and_again())

    await asyncio.sleep(1.0)  # every replica has reported
    try:
        await part(steady)  # the first calls of an actor are slower than all others
        waits, ages, _ = await part(steady)
        burst_waits, burst_ages, took = await part(as_many_as_can_be)
    finally:
        for task in (*running, *serving):
            task.cancel()
        await asyncio.gather(*running, *serving, return_exceptions=True)
    return {
        "replicas": REPLICAS,
        "steady_per_second": STEADY_PER_SECOND,
        "acquire_p50_ms": _percentile(waits, 50),
        "acquire_p99_ms": _percentile(waits, 99),
        "report_age_p50_ms": _percentile(ages, 50),
        "report_age_p99_ms": _percentile(ages, 99),
        "in_flight": IN_FLIGHT,
        "acquires_per_second": round(len(burst_waits) / took, 1),
        "burst_acquire_p50_ms": _percentile(burst_waits, 50),
        "burst_report_age_p99_ms": _percentile(burst_ages, 99),
    }


def _percentile(seconds: list[float], percent: int) -> float:
    """In milliseconds."""
    return round(1000 * quantiles(seconds, n=100)[percent - 1], 3)
