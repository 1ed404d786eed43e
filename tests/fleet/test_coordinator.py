"""The coordinator's actor code without Ray: futures around the admission core."""

import asyncio
import json
from collections import Counter
from dataclasses import replace

import pytest

from deploy.coordinator import WITHOUT_COORDINATOR, Coordinator
from deploy.messages import CapacityReport, Demand, Placement, Refusal, ReplicaLimits
from deploy.router import _REASONS as ROUTER_REASONS
from deploy.settings import CoordinatorSettings
from deploy.tiers import Tier
from triattention.report import EngineReport

SETTINGS = CoordinatorSettings(queue_length=1, queue_deadline_seconds=0.3, stale_report_seconds=60)


def report(sequence: int, free: int, finished: tuple[str, ...] = ()) -> CapacityReport:
    engine = EngineReport(
        block_size=32,
        bytes_per_block=1,
        total_blocks=10,
        free_blocks=free,
        running=0,
        waiting=0,
        in_flight_tokens=1,
    )
    return CapacityReport("r1", "epoch", sequence, ReplicaLimits(1000, None), engine, {}, finished=finished)


def demand(name: str, tokens: int = 320) -> Demand:
    """320 tokens are the whole pool."""
    return Demand(name, prompt_tokens=32, total_tokens=tokens)


async def test_a_queued_request_gets_its_place_when_a_report_tells_of_the_end_before_it() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.report(report(1, free=10))
    assert isinstance(await coordinator.acquire(demand("a")), Placement)
    waiting = asyncio.create_task(coordinator.acquire(demand("b")))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await coordinator.report(report(2, free=10, finished=("a",)))
    assert await waiting == Placement("b", "r1", "least_loaded_of_two", "short")


async def test_a_queued_request_is_refused_at_its_deadline_by_the_clock_alone() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.address()  # which starts the clock
    await coordinator.report(report(1, free=10))
    await coordinator.acquire(demand("a"))
    decision = await asyncio.wait_for(coordinator.acquire(demand("b")), 1)
    assert isinstance(decision, Refusal)
    assert decision.status == 503


async def test_a_coordinator_to_which_no_replica_reports_refuses_at_the_deadline() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.address()
    decision = await asyncio.wait_for(coordinator.acquire(demand("a")), 1)
    assert isinstance(decision, Refusal)
    assert (decision.status, decision.reason) == (503, "no_replica")


async def test_a_coordinator_whose_clock_fails_ends_and_does_not_go_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr("os._exit", ended.set_result)
    coordinator = Coordinator(SETTINGS, "m")
    monkeypatch.setattr(coordinator._admission, "tick", lambda now: 1 / 0)
    await coordinator.address()
    assert await asyncio.wait_for(ended, 1) == 1


async def test_a_caller_that_goes_away_leaves_the_queue() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.report(report(1, free=10))
    await coordinator.acquire(demand("a"))
    waiting = asyncio.create_task(coordinator.acquire(demand("b")))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert sum(json.loads(await coordinator.status())["queue_length"].values()) == 0


async def test_a_queued_request_that_is_released_waits_no_longer() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.report(report(1, free=10))
    await coordinator.acquire(demand("a"))
    waiting = asyncio.create_task(coordinator.acquire(demand("b")))
    await asyncio.sleep(0.05)
    await coordinator.release("b")
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(1):
            await waiting
    assert coordinator._waiting == {}


async def test_what_the_router_did_alone_is_in_the_metrics_of_replicas_that_exist() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.report(report(1, free=10))
    for _ in range(2):
        await coordinator.count_router(Counter({("default", "bad_request"): 2}), Counter({"r1": 3, "long-gone": 1}))
    fleet = json.loads(await coordinator.status())
    assert fleet["rejections"]["bad_request"] == 4
    assert fleet["tiers"]["default"]["counts"]["rejections"]["bad_request"] == 4
    assert list(fleet["placements"]) == ["r1"]
    assert fleet["placements"]["r1"][WITHOUT_COORDINATOR] == 6
    page = (await coordinator.metrics()).decode()
    assert 'trifleet_placements_total{model="m",reason="without_coordinator",replica="r1"} 6.0' in page


async def test_what_the_router_does_alone_counts_from_zero() -> None:
    """A series that begins with its first event hides it from rate()."""
    coordinator = Coordinator(SETTINGS, "m", {"silver": Tier()})
    await coordinator.report(report(1, free=10))
    page = (await coordinator.metrics()).decode()
    assert 'trifleet_placements_total{model="m",reason="without_coordinator",replica="r1"} 0.0' in page
    for reason in ("no_key", "bad_request", *ROUTER_REASONS.values()):
        for tier in ("default", "silver"):
            assert f'trifleet_rejections_total{{model="m",reason="{reason}",tier="{tier}"}} 0.0' in page


async def test_a_tier_that_the_settings_have_lost_is_the_default_one() -> None:
    """A router lives on for some time after a new coordinator has come with other settings."""
    coordinator = Coordinator(SETTINGS, "m", {"silver": Tier()})
    await coordinator.report(report(1, free=10))
    await coordinator.count_router(Counter({("gold", "bad_request"): 2, ("silver", "bad_request"): 1}), Counter())
    assert isinstance(await coordinator.acquire(replace(demand("a", 32), tier="gold")), Placement)
    tiers = json.loads(await coordinator.status())["tiers"]
    assert tiers["default"]["counts"]["rejections"]["bad_request"] == 2
    assert tiers["default"]["counts"]["admissions"] == 1
    assert tiers["silver"]["counts"]["rejections"]["bad_request"] == 1


async def test_what_autoscaling_asks_for_is_no_change_of_settings() -> None:
    coordinator = Coordinator(SETTINGS, "m", {}, wanted_replicas=2)
    await coordinator.load(5)
    assert await coordinator.runs_with(SETTINGS, "m", {}, 2)
    assert not await coordinator.runs_with(SETTINGS, "m", {}, 3)


async def test_a_request_that_comes_back_is_placed_anew_and_counted() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.report(report(1, free=10))
    await coordinator.acquire(demand("a", 32))
    again = asyncio.create_task(coordinator.acquire(demand("b", 32), "a"))
    await asyncio.sleep(0.05)
    assert not again.done(), "the only replica has just failed it"
    assert json.loads(await coordinator.status())["retries"] == 1
    again.cancel()
    with pytest.raises(asyncio.CancelledError):
        await again


async def test_the_router_learns_which_silent_replicas_to_probe() -> None:
    coordinator = Coordinator(CoordinatorSettings(stale_report_seconds=0.3), "m")
    await coordinator.report(report(1, free=10))
    assert await coordinator.listed("n1", frozenset({"r1"})) == []
    await asyncio.sleep(0.4)
    assert await coordinator.listed("n1", frozenset({"r1"})) == ["r1"]
    assert json.loads(await coordinator.status())["probes"] == 1
    await coordinator.report(report(2, free=10))
    assert await coordinator.listed("n1", frozenset({"r1"})) == []


async def test_a_router_that_tells_of_no_change_is_asked_for_its_replicas_by_a_coordinator_that_began_anew() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.report(report(1, free=10))
    assert await coordinator.listed("n1", None) is None
    await coordinator.listed("n1", frozenset({"another"}))
    assert await coordinator.listed("n1", None) == []
    known = json.loads(await coordinator.status())["replicas"]
    assert [replica["reachable"] for replica in known] == [False]


async def test_a_replica_that_one_of_two_routers_cannot_reach_yet_gets_nothing() -> None:
    coordinator = Coordinator(SETTINGS, "m")
    await coordinator.report(report(1, free=10))
    await coordinator.report(replace(report(1, free=10), replica="r2"))
    await coordinator.listed("n1", frozenset({"r1", "r2"}))
    await coordinator.listed("n2", frozenset({"r1"}))
    placed = [await coordinator.acquire(demand(name, 32)) for name in "abcd"]
    assert {decision.replica for decision in placed if isinstance(decision, Placement)} == {"r1"}
    known = json.loads(await coordinator.status())["replicas"]
    assert [replica["reachable"] for replica in known] == [True, False]
    await coordinator.listed("n2", frozenset({"r1", "r2"}))
    decision = await coordinator.acquire(demand("e", 32))
    assert isinstance(decision, Placement)
    assert decision.replica == "r2"
