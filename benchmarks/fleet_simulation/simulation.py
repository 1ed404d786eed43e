"""The clock: one heap of events in virtual time, the replicas that wake by it, and what became of every request."""

import heapq
import random
import time
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from benchmarks.fleet_simulation.replica import Job, SimulatedReplica
from benchmarks.fleet_simulation.routers import HEARTBEAT_SECONDS, SHORTEST_REPORT_SECONDS, TICK_SECONDS, Way
from benchmarks.fleet_simulation.trace import POOLS, Scenario, Trace, draw_lengths

WAKE, REPORT, TICK, SCRAPE = range(4)

ANSWERED, REFUSED, GAVE_UP = range(1, 4)
"""How a request ends: whole, refused by the coordinator (deadline passed or queue full), or left by its client, who
had no first token in time."""


@dataclass
class Outcome:
    """What became of a trace under one router. Columns [requests] aligned with the trace's; seconds of the trace."""

    end: NDArray[np.int8]
    first_token: NDArray[np.float64]
    """NaN where there was none."""
    finished: NDArray[np.float64]
    preempted: NDArray[np.int64]
    """Times."""
    preemptions: int
    recomputed_tokens: int
    cpu_seconds: float
    """What the simulation took of one core."""


def make_fleet(replicas: int, scenario: Scenario, listener: "Simulation") -> list[SimulatedReplica]:
    """Makes in turn, so that a router that goes by order meets them mixed."""
    owed = [0.0] * len(POOLS)
    fleet = []
    for _ in range(replicas):
        owed = [debt + pool.share for debt, pool in zip(owed, POOLS, strict=True)]
        number = owed.index(max(owed))
        owed[number] -= 1
        pool = POOLS[number]
        fleet.append(
            SimulatedReplica(pool, scenario.clock, scenario.patience_seconds, scenario.reserve_growth, listener)
        )
    return fleet


class Simulation:
    def __init__(self, trace: Trace, scenario: Scenario, replicas: int, way: Way, seed: int) -> None:
        self.trace = trace
        self.replicas = make_fleet(replicas, scenario, self)
        n = len(trace)
        self.outcome = Outcome(
            np.zeros(n, np.int8), np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, np.int64), 0, 0, 0.0
        )
        self.living = n
        self._events: list[tuple[float, int, int, int]] = []
        self._order = count()
        self._scheduled: list[float | None] = [None] * replicas
        """Replica -> the time of its one WAKE event that counts."""
        self._finished: list[list[Job]] = [[] for _ in range(replicas)]
        self._reported_at = [0.0] * replicas
        self._report_due = [0.0] * replicas
        self._now_at = 0
        self.router = way.router(self, random.Random(seed), scenario.patience_seconds)

    def run(self) -> Outcome:
        """Until every request has ended."""
        began = time.process_time()
        rng = random.Random(1)
        if self.router.takes_reports:
            self._push(TICK_SECONDS, TICK, 0)
            for number in range(len(self.replicas)):
                self._due(number, rng.random() * HEARTBEAT_SECONDS)
        if self.router.scrape_seconds is not None:
            for number in range(len(self.replicas)):
                self._push(rng.random() * self.router.scrape_seconds, SCRAPE, number)
        trace = self.trace
        columns = (trace.arrival, trace.prompt, trace.output, trace.max_tokens)
        jobs = (Job(i, *values) for i, values in enumerate(zip(*(c.tolist() for c in columns), strict=True)))
        job = next(jobs, None)
        while self.living:
            if job is not None and (not self._events or job.arrival <= self._events[0][0]):
                self.router.arrive(job, job.arrival)
                job = next(jobs, None)
            else:
                now, _, kind, number = heapq.heappop(self._events)
                self._handle(kind, number, now)
        assert not any(replica.requests for replica in self.replicas)
        self.outcome.preemptions = sum(replica.preemptions for replica in self.replicas)
        self.outcome.recomputed_tokens = sum(replica.recomputed_tokens for replica in self.replicas)
        self.outcome.cpu_seconds = time.process_time() - began
        return self.outcome

    # -- what routers and replicas do through it ---------------------------------------------------------

    def send(self, job: Job, replica: int, now: float) -> None:
        self.replicas[replica].arrive(job, now)
        self._schedule_wake(replica)

    def refuse(self, job: Job, reason: str, now: float) -> None:
        self._end(job, REFUSED, now)

    def finished(self, job: Job, now: float) -> None:
        assert job.first_token_at is not None
        self._end(job, ANSWERED, now)
        self._finished[self._now_at].append(job)

    def gave_up(self, job: Job, now: float) -> None:
        self._end(job, GAVE_UP, now)
        self._finished[self._now_at].append(job)

    def _end(self, job: Job, how: int, now: float) -> None:
        outcome = self.outcome
        assert outcome.end[job.number] == 0, f"request {job.number} ends twice"
        outcome.end[job.number] = how
        outcome.finished[job.number] = now
        outcome.preempted[job.number] = job.preemptions
        if job.first_token_at is not None:
            outcome.first_token[job.number] = job.first_token_at
        self.living -= 1

    # -- events ------------------------------------------------------------------------------------------

    def _handle(self, kind: int, number: int, now: float) -> None:
        if kind == WAKE:
            if self._scheduled[number] == now:
                self._scheduled[number] = None
                self._now_at = number
                self.replicas[number].turn()
                self._schedule_wake(number)
                if self._finished[number] and self.router.takes_reports:
                    self._report_soon(number, now)
        elif kind == REPORT:
            if self._report_due[number] == now:
                self._reported_at[number] = now
                self._due(number, now + HEARTBEAT_SECONDS)
                finished, self._finished[number] = tuple(self._finished[number]), []
                self.router.report(number, finished, now)
        elif kind == TICK:
            self.router.tick(now)
            self._push(now + TICK_SECONDS, TICK, 0)
        else:
            assert self.router.scrape_seconds is not None
            self.router.scrape(number, now)
            self._push(now + self.router.scrape_seconds, SCRAPE, number)

    def _schedule_wake(self, number: int) -> None:
        wake = self.replicas[number].wake
        if wake is not None and wake != self._scheduled[number]:
            self._scheduled[number] = wake
            self._push(wake, WAKE, number)

    def _report_soon(self, number: int, now: float) -> None:
        """At once, or when the last report is old enough. Real replicas also report growth, every 50 ms; here that
        waits for the heartbeat, as it does not change the headroom: what is held more is predicted less."""
        soonest = max(now, self._reported_at[number] + SHORTEST_REPORT_SECONDS)
        if soonest < self._report_due[number]:
            self._due(number, soonest)

    def _due(self, number: int, at: float) -> None:
        self._report_due[number] = at
        self._push(at, REPORT, number)

    def _push(self, at: float, kind: int, number: int) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, number))


def tokens_per_second(replicas: int, scenario: Scenario, seed: int, requests: int = 2000) -> float:
    """What a fleet of so many replicas writes when all are kept full with the scenario's mix: its `load` of 1.

    One replica of each make gets `requests` at once, with its engine's own admission; the last quarter, in which its
    batch runs empty, does not count.
    """
    total = 0.0
    for number, pool in enumerate(POOLS):
        rng = np.random.default_rng((seed, number))
        is_long = rng.random(requests) < scenario.long_share
        prompt, output, max_tokens = draw_lengths(is_long, rng)
        ended = _Ended()
        replica = SimulatedReplica(pool, scenario.clock, float("inf"), scenario.reserve_growth, ended)
        for i in range(requests):
            replica.arrive(Job(i, 0.0, int(prompt[i]), int(output[i]), int(max_tokens[i])), 0.0)
        while len(ended.tokens) < requests * 3 // 4:
            replica.turn()
        total += pool.share * replicas * sum(ended.tokens) / ended.last
    return total


class _Ended:
    """Adds up what one replica wrote."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.last = 0.0

    def finished(self, job: Job, now: float) -> None:
        self.tokens.append(job.output)
        self.last = now

    def gave_up(self, job: Job, now: float) -> None:
        raise AssertionError("patience is without end here")
