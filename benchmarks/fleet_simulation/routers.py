"""The ways to route that are compared. Only the ledgers queue and refuse; the others send every request on at once.

What each knows: round robin nothing; power of two the true number of requests at the two replicas it draws (Ray
Serve's default asks them); least KV usage the blocks in use as of the last scrape, every replica scraped at its own
phase; the ledgers what the replicas' capacity reports say, through the product's own code.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.fleet_simulation.replica import IN_FLIGHT_TOKENS, Job, SimulatedReplica
from deploy.admission import Admission
from deploy.messages import CapacityReport, Decision, Demand, Placement, ReplicaLimits
from deploy.settings import CoordinatorSettings
from triattention.report import EngineReport

TICK_SECONDS = 0.1
SHORTEST_REPORT_SECONDS = 0.05
HEARTBEAT_SECONDS = 5.0


class Fleet(Protocol):
    """What a router may do to the fleet."""

    @property
    def replicas(self) -> Sequence[SimulatedReplica]: ...

    def send(self, job: Job, replica: int, now: float) -> None: ...

    def refuse(self, job: Job, reason: str, now: float) -> None: ...


class Router(Protocol):
    """Every method may send and refuse through the fleet that the router was made with."""

    scrape_seconds: float | None
    """How often `scrape` is called for each replica; None: never."""
    takes_reports: bool
    """Whether replicas push capacity reports, and `tick` is called."""

    def arrive(self, job: Job, now: float) -> None: ...

    def scrape(self, replica: int, now: float) -> None: ...

    def report(self, replica: int, finished: tuple[Job, ...], now: float) -> None: ...

    def tick(self, now: float) -> None: ...


class _Blind:
    """A router that takes no reports."""

    scrape_seconds: float | None = None
    takes_reports = False

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self.fleet = fleet
        self.rng = rng

    def scrape(self, replica: int, now: float) -> None:
        raise NotImplementedError

    def report(self, replica: int, finished: tuple[Job, ...], now: float) -> None:
        raise NotImplementedError

    def tick(self, now: float) -> None:
        raise NotImplementedError


class RoundRobin(_Blind):
    _next = 0

    def arrive(self, job: Job, now: float) -> None:
        self.fleet.send(job, self._next, now)
        self._next = (self._next + 1) % len(self.fleet.replicas)


class PowerOfTwo(_Blind):
    def arrive(self, job: Job, now: float) -> None:
        pair = self.rng.sample(range(len(self.fleet.replicas)), 2)
        self.fleet.send(job, min(pair, key=lambda replica: self.fleet.replicas[replica].requests), now)


class LeastKvUsage(_Blind):
    """The lowest share of blocks in use at the last scrape; equal ones at random."""

    def __init__(self, fleet: Fleet, rng: random.Random, scrape_seconds: float) -> None:
        super().__init__(fleet, rng)
        self.scrape_seconds = scrape_seconds
        self._usage = np.zeros(len(fleet.replicas))

    def scrape(self, replica: int, now: float) -> None:
        known = self.fleet.replicas[replica]
        self._usage[replica] = known.used_blocks(now) / known.pool.total_blocks

    def arrive(self, job: Job, now: float) -> None:
        least = np.flatnonzero(self._usage == self._usage.min())
        self.fleet.send(job, int(least[self.rng.randrange(len(least))]), now)


class HeadroomLedger:
    """The product's ledger, placement and admission. `knows_bound` off: it books prompt and output whole."""

    scrape_seconds: float | None = None
    takes_reports = True

    def __init__(self, fleet: Fleet, rng: random.Random, patience_seconds: float, knows_bound: bool = True) -> None:
        self.fleet = fleet
        self.admission = Admission(coordinator_settings(patience_seconds, None if knows_bound else 1), rng)
        self.held_elsewhere: dict[str, Job] = {}
        """Jobs that wait in the coordinator's queue."""
        self._knows_bound = knows_bound
        self._sequence = 0
        self._number_of: dict[str, int] = {}
        for number in range(len(fleet.replicas)):
            self._number_of[f"replica-{number}"] = number
            self.report(number, (), 0.0)

    def arrive(self, job: Job, now: float) -> None:
        demand = Demand(str(job.number), job.prompt, job.prompt + job.max_tokens)
        self.held_elsewhere[demand.reservation] = job
        decision = self.admission.submit(demand, now)
        if decision is not None:
            self._carry_out([decision], now)

    def scrape(self, replica: int, now: float) -> None:
        raise NotImplementedError

    def report(self, replica: int, finished: tuple[Job, ...], now: float) -> None:
        known = self.fleet.replicas[replica]
        self._sequence += 1
        held, used = known.held_blocks(now)
        report = CapacityReport(
            replica=f"replica-{replica}",
            epoch="first",
            sequence=self._sequence,
            limits=_limits(known, self._knows_bound),
            engine=EngineReport(
                block_size=known.pool.block_size,
                bytes_per_block=1,
                total_blocks=known.pool.total_blocks,
                free_blocks=known.pool.total_blocks - used,
                running=len(known.jobs),
                waiting=len(known.waiting),
                in_flight_tokens=IN_FLIGHT_TOKENS,
                preemptions=known.preemptions,
            ),
            held_blocks=held,
            output_tokens=known.written_tokens(now)
            | {str(job.number): job.output for job in finished if job.first_token_at is not None},
            finished=tuple(str(job.number) for job in finished),
        )
        self._carry_out(self.admission.observe(report, now), now)

    def tick(self, now: float) -> None:
        self._carry_out(self.admission.tick(now), now)

    def _carry_out(self, decisions: list[Decision], now: float) -> None:
        for decision in decisions:
            job = self.held_elsewhere.pop(decision.reservation)
            if isinstance(decision, Placement):
                self.fleet.send(job, self._number_of[decision.replica], now)
            else:
                self.fleet.refuse(job, decision.reason, now)


def coordinator_settings(patience_seconds: float, growth_quantile: float | None = None) -> CoordinatorSettings:
    """The defaults but for: a queue without end, as the other routers have one in every engine, and short requests of
    up to 3,072 tokens, prompt and `max_tokens` together, which in this trace are the chats; and times that go with
    rarer heartbeats."""
    defaults = CoordinatorSettings()
    return CoordinatorSettings(
        queue_length=10**9,
        queue_deadline_seconds=patience_seconds,
        short_request_tokens=3072,
        heartbeat_seconds=HEARTBEAT_SECONDS,
        stale_report_seconds=2 * HEARTBEAT_SECONDS,
        lease_seconds=4 * HEARTBEAT_SECONDS,
        growth_quantile=defaults.growth_quantile if growth_quantile is None else growth_quantile,
    )


def _limits(replica: SimulatedReplica, knows_bound: bool) -> ReplicaLimits:
    compression = replica.pool.compression.model_copy(update={"reserve_growth": replica.reserve_growth})
    return ReplicaLimits(replica.pool.max_model_len, compression if knows_bound else None)


@dataclass(frozen=True)
class Way:
    """One way to route, as the tables name it."""

    name: str
    title: str

    def router(self, fleet: Fleet, rng: random.Random, patience_seconds: float) -> Router:
        if self.name == "power_of_two":
            return PowerOfTwo(fleet, rng)
        if self.name == "round_robin":
            return RoundRobin(fleet, rng)
        if self.name.startswith("least_kv_usage"):
            return LeastKvUsage(fleet, rng, scrape_seconds=10.0 if self.name.endswith("10s") else 1.0)
        return HeadroomLedger(fleet, rng, patience_seconds, knows_bound=self.name == "headroom")


WAYS = (
    Way("headroom", "headroom (ours)"),
    Way("power_of_two", "power of two choices"),
    Way("round_robin", "round robin"),
    Way("least_kv_usage_1s", "least KV usage, 1 s old"),
    Way("least_kv_usage_10s", "least KV usage, 10 s old"),
    Way("whole_length_ledger", "ledger of prompt + output"),
)
