"""The fleet simulation: its replica against one that goes token by token, and what it may never lose."""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fleet_simulation import routers
from benchmarks.fleet_simulation.replica import IN_FLIGHT_TOKENS, Job, SimulatedReplica
from benchmarks.fleet_simulation.report import plot, table_of
from benchmarks.fleet_simulation.routers import WAYS, HeadroomLedger, coordinator_settings
from benchmarks.fleet_simulation.run import run_scenario
from benchmarks.fleet_simulation.simulation import ANSWERED, GAVE_UP, REFUSED, Simulation, tokens_per_second
from benchmarks.fleet_simulation.trace import SCENARIOS, Clock, Pool, make_trace
from triattention.bounds import blocks_bound, cdiv
from triattention.compaction import first_live_block
from triattention.config import CompressionConfig

CONFIG = CompressionConfig.model_validate({"budget": 64, "interval": 32, "window": 8, "policy": "random"})
POOL = Pool(1.0, total_blocks=30, block_size=16, compression=CONFIG, max_num_seqs=6, max_num_batched_tokens=64)
CLOCK = Clock(step=0.01, sequence=0.001, prompt_token=0.0001)
PATIENCE = 3.0


@dataclass
class Ends:
    """Who ended how and when."""

    finished_at: dict[int, float]
    gave_up_at: dict[int, float]

    def finished(self, job: Job, now: float) -> None:
        self.finished_at[job.number] = now

    def gave_up(self, job: Job, now: float) -> None:
        self.gave_up_at[job.number] = now


def run_replica(jobs: list[Job], pool: Pool, reserve_growth: bool) -> tuple[SimulatedReplica, Ends]:
    ends = Ends({}, {})
    replica = SimulatedReplica(pool, CLOCK, PATIENCE, reserve_growth, ends)
    arriving = deque(jobs)
    while arriving or replica.wake is not None:
        if arriving and (replica.wake is None or arriving[0].arrival <= replica.wake):
            replica.arrive(arriving[0], arriving.popleft().arrival)
        else:
            replica.turn()
    return replica, ends


class TokenByToken:
    """The same engine, step by step and token by token, with the product's own compaction rule."""

    def __init__(self, pool: Pool, reserve_growth: bool) -> None:
        self.pool, self.reserve_growth = pool, reserve_growth
        self.running: list[dict] = []
        self.waiting: deque[Job] = deque()
        self.preemptions = 0
        self.peak = 0

    def blocks(self, one: dict) -> int:
        """Held in the coming step."""
        if one["chunks"]:
            return one["prefill"]
        processed = one["tokens"]
        cut = first_live_block(processed, one["start"], self.pool.block_size, CONFIG)
        if cut is not None:
            one["start"] = cut
        return one["pinned"] + cdiv(processed + 1, self.pool.block_size) - one["start"]

    def run(self, jobs: list[Job]) -> Ends:
        ends = Ends({}, {})
        arriving = deque(jobs)
        now = 0.0
        while arriving or self.running or self.waiting:
            if not self.running and not self.waiting:
                now = max(now, arriving[0].arrival)
            while arriving and arriving[0].arrival <= now:
                self.waiting.append(arriving.popleft())
            now = self.step(now, ends)
        return ends

    def step(self, now: float, ends: Ends) -> float:
        total = self.pool.total_blocks
        preempted = False
        while sum(map(self.blocks, self.running)) > total:
            one = self.running.pop()
            one["job"].generated = one["written"]
            one["job"].preemptions += 1
            self.preemptions += 1
            self.waiting.appendleft(one["job"])
            preempted = True
        prompt_tokens = 0
        while self.waiting and not preempted:
            job = self.waiting[0]
            if job.first_token_at is None and now - job.arrival > PATIENCE:
                ends.gave_up(self.waiting.popleft(), job.arrival + PATIENCE)
                continue
            tokens = job.prompt + job.generated
            in_flight = self.pool.max_num_batched_tokens if job.preemptions else IN_FLIGHT_TOKENS
            bound = blocks_bound(job.prompt, job.prompt + job.max_tokens, self.pool.block_size, CONFIG, in_flight)
            prefill = min(cdiv(tokens, self.pool.block_size), bound)
            promised = sum(one["bound"] for one in self.running)
            held = sum(map(self.blocks, self.running))
            needs = promised + bound if self.reserve_growth else held + prefill
            if len(self.running) == self.pool.max_num_seqs or needs > total:
                break
            self.waiting.popleft()
            pinned = cdiv(job.prompt, self.pool.block_size)
            start = pinned
            if job.generated and tokens - 1 - pinned * self.pool.block_size >= CONFIG.budget + CONFIG.interval:
                start = (tokens - 1 - CONFIG.budget) // self.pool.block_size
            self.running.append(
                {
                    "job": job, "tokens": tokens, "written": job.generated, "pinned": pinned, "start": start,
                    "prefill": prefill, "bound": bound, "chunks": cdiv(tokens, self.pool.max_num_batched_tokens),
                }
            )  # fmt: skip
            prompt_tokens += tokens
        if not self.running:
            return now
        self.peak = max(self.peak, sum(map(self.blocks, self.running)))
        now += CLOCK.step + CLOCK.sequence * len(self.running) + CLOCK.prompt_token * prompt_tokens
        for one in list(self.running):
            if one["chunks"]:
                one["chunks"] -= 1
                if one["chunks"]:
                    continue
            else:
                one["tokens"] += 1
            one["written"] += 1
            if one["job"].first_token_at is None:
                one["job"].first_token_at = now
            if one["written"] == one["job"].output:
                ends.finished(one["job"], now)
                self.running.remove(one)
        return now


@st.composite
def some_jobs(draw: st.DrawFn) -> list[Job]:
    jobs, now = [], 0.0
    for number in range(draw(st.integers(1, 12))):
        # Never just at the end of a step, where rounding would decide: those are multiples of 0.1 ms apart.
        now += draw(st.sampled_from([0.0, 0.00317391, 0.05113717, 0.87131313]))
        output = draw(st.integers(1, 300))
        jobs.append(Job(number, now, draw(st.integers(1, 150)), output, output + draw(st.integers(0, 500))))
    return jobs


@settings(max_examples=150)
@given(jobs=some_jobs(), total=st.sampled_from([20, 30, 60]), reserve_growth=st.booleans())
def test_the_replica_does_what_one_does_that_goes_token_by_token(jobs, total, reserve_growth):
    pool = replace(POOL, total_blocks=total)
    plain_jobs = [replace(job) for job in jobs]
    plain = TokenByToken(pool, reserve_growth)
    expected = plain.run(plain_jobs)
    replica, ends = run_replica(jobs, pool, reserve_growth)
    assert replica.preemptions == plain.preemptions
    assert [job.preemptions for job in jobs] == [job.preemptions for job in plain_jobs]
    assert ends.finished_at == pytest.approx(expected.finished_at)
    assert ends.gave_up_at == pytest.approx(expected.gave_up_at)
    for job, other in zip(jobs, plain_jobs, strict=True):
        assert job.first_token_at == (None if other.first_token_at is None else pytest.approx(other.first_token_at))
    assert plain.peak <= total
    assert len(ends.finished_at) + len(ends.gave_up_at) == len(jobs)
    assert not reserve_growth or replica.preemptions == 0


@settings(max_examples=60)
@given(prompt=st.integers(1, 300), output=st.integers(1, 1500), spare=st.integers(0, 500))
def test_a_lone_request_never_holds_more_than_the_bound_and_a_long_one_reaches_it(prompt, output, spare):
    pool = replace(POOL, total_blocks=1000)
    replica = SimulatedReplica(pool, CLOCK, PATIENCE, False, Ends({}, {}))
    replica.arrive(Job(0, 0.0, prompt, output, output + spare), 0.0)
    replica.turn()
    seconds = CLOCK.step + CLOCK.sequence
    begin = CLOCK.prompt_token * prompt + seconds * (cdiv(prompt, pool.max_num_batched_tokens) - 0.5)
    held = [replica.used_blocks(begin + step * seconds) for step in range(output)]
    bound = blocks_bound(prompt, prompt + output + spare, pool.block_size, CONFIG, IN_FLIGHT_TOKENS)
    assert max(held) <= bound
    if output > CONFIG.budget + 2 * CONFIG.interval + pool.block_size:
        assert max(held) == bound


def a_trace(scenario, replicas, requests, seed=0):
    return make_trace(scenario, requests, tokens_per_second(replicas, scenario, seed=1, requests=200), seed)


(OURS,) = [way for way in WAYS if way.name == "headroom"]
OVERLOAD = replace(
    SCENARIOS["overload"], load=3.0, long_share=0.4, calm_seconds=40, burst_seconds=20, patience_seconds=15.0
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_request_ends_once_and_the_outcome_repeats(way):
    trace = a_trace(OVERLOAD, 6, 700)
    first = Simulation(trace, OVERLOAD, 6, way, seed=3).run()
    assert set(np.unique(first.end)) <= {ANSWERED, REFUSED, GAVE_UP}
    assert np.isnan(first.first_token).sum() == (first.end != ANSWERED).sum()
    assert (first.finished >= trace.arrival).all()
    second = Simulation(trace, OVERLOAD, 6, way, seed=3).run()
    for column in ("end", "first_token", "finished", "preempted"):
        np.testing.assert_array_equal(getattr(first, column), getattr(second, column))
    assert first.preemptions == second.preemptions == first.preempted.sum()


def test_the_same_seed_makes_the_same_trace_and_another_one_does_not():
    first, second, other = (a_trace(OVERLOAD, 6, 500, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.arrival, second.arrival)
    assert (first.output <= first.max_tokens).all()
    assert (first.arrival != other.arrival).any()


def test_headroom_with_whole_bounds_never_lets_an_engine_preempt_and_leaves_nothing_in_the_ledger(monkeypatch):
    monkeypatch.setattr(routers, "coordinator_settings", lambda patience, _: coordinator_settings(patience, 1))
    trace = a_trace(OVERLOAD, 6, 700)
    run = Simulation(trace, OVERLOAD, 6, OURS, seed=3)
    least = []
    router = run.router
    assert isinstance(router, HeadroomLedger)
    report = router.report

    def watched(replica: int, finished: tuple[Job, ...], now: float) -> None:
        report(replica, finished, now)
        least.append(router.admission._ledger.table.headroom.min())

    monkeypatch.setattr(router, "report", watched)
    outcome = run.run()
    assert outcome.preemptions == 0
    assert (outcome.end == REFUSED).any()  # it was an overload
    assert min(least) >= 0
    for number in range(6):
        report(number, tuple(run._finished[number]), 1e6)
    snapshot = router.admission.snapshot(1e6)
    assert snapshot.queue_length == {"short": 0, "long": 0}
    assert all(r.reservations == 0 and r.headroom_blocks == r.engine.total_blocks for r in snapshot.replicas)


def test_headroom_by_expected_growth_answers_more_than_by_whole_bounds_and_preempts_far_less_than_power_of_two(
    monkeypatch,
):
    trace = a_trace(OVERLOAD, 6, 700)
    (two,) = [way for way in WAYS if way.name == "power_of_two"]
    of_two = Simulation(trace, OVERLOAD, 6, two, seed=3).run()
    ours = Simulation(trace, OVERLOAD, 6, OURS, seed=3).run()
    monkeypatch.setattr(routers, "coordinator_settings", lambda patience, _: coordinator_settings(patience, 1))
    whole = Simulation(trace, OVERLOAD, 6, OURS, seed=3).run()
    # Little is known of the lengths after a few hundred requests.
    assert 0 < ours.preemptions < 0.4 * of_two.preemptions
    assert trace.output[ours.end == ANSWERED].sum() > 1.03 * trace.output[whole.end == ANSWERED].sum()


def test_a_run_of_all_routers_gives_figures_a_table_and_a_picture(tmp_path):
    seen = []
    figures = run_scenario(OVERLOAD, 6, 300, on_done=lambda way, of: seen.append(way.name))
    assert set(seen) == {way.name for way in WAYS} == set(figures["ways"])
    for of in figures["ways"].values():
        assert of["answered"] + of["refused"] + of["gave_up"] == 300
        assert sum(of["token_share"].values()) == pytest.approx(1, abs=1e-4)
    assert figures["preemptions_over_power_of_two"] == 0
    assert [table.row_count for table in table_of(figures).renderables] == [len(WAYS)] * 2
    plot(figures, tmp_path / "fleet.png")
    assert (tmp_path / "fleet.png").stat().st_size > 20_000
