"""The wire between routers, replicas and the coordinator, over real sockets."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from deploy.coordinator import Coordinator
from deploy.listener import TOKEN_BYTES, Listener
from deploy.messages import DecisionPair, Demand, Placement
from deploy.settings import CoordinatorSettings
from replicas.link import PATIENT_SECONDS, Address, CallError, Link
from replicas.messages import CapacityReport, GpuReading, Pace, ReplicaLimits, TierUsage
from tests.fleet.test_coordinator import demand, report
from triattention.config import CompressionConfig

FULL = replace(
    report(3, free=4, finished=("c",)),
    limits=ReplicaLimits(1000, CompressionConfig.model_validate({"budget": 256, "policy": "random"})),
    held_blocks={"a": 3, "b": 0},
    output_tokens={"a": 17},
    block_seconds={"c": 1.5},
    tiers={"default": TierUsage(1, 20, 1.5, {"short": Pace(30, 0.25)})},
    gpu=GpuReading(1, 80 << 30, 1 << 30, None, 5.5),
)

Serve = Callable[..., Awaitable[Address]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a listener with these calls, typed by their kinds; ends it with the test."""
    listeners = []

    async def start(**calls: tuple[Any, Callable[..., Awaitable[Any]]]) -> Address:
        listener = Listener(calls)
        listeners.append(listener)
        return await listener.start("127.0.0.1")

    yield start
    for listener in listeners:
        listener.stop()


def link_to(address: Address) -> Link:
    async def find() -> Address:
        return address

    return Link(find)


async def same(value: Any) -> Any:
    return value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (CapacityReport, FULL),
        (Demand, replace(demand("a"), prefix=(-(1 << 63), (1 << 63) - 1), avoid="r1")),
        (DecisionPair, (Placement("a", "r1", "most_headroom", "long"), None)),
        (dict[tuple[str, str], int], {("default", "no_key"): 2}),
        (bytes, b"# HELP \xff"),
    ],
)
async def test_a_message_arrives_as_it_was_sent(serve: Serve, kind: Any, value: Any) -> None:
    link = link_to(await serve(same=(tuple[kind], same)))
    assert await link.call(kind, "same", value) == value


async def test_answers_find_their_calls_in_whatever_order_they_come(serve: Serve) -> None:
    async def slow_first(number: int) -> int:
        await asyncio.sleep(0.2 - number / 100)
        return number

    link = link_to(await serve(slow_first=(tuple[int], slow_first)))
    assert await asyncio.gather(*(link.call(int, "slow_first", n) for n in range(20))) == list(range(20))


async def test_a_call_that_fails_tells_why_and_costs_no_other_its_answer(serve: Serve) -> None:
    async def refuse(value: int) -> None:
        raise ValueError("reservation x is in use")

    link = link_to(await serve(refuse=(tuple[int], refuse), same=(tuple[int], same)))
    failing, fine = link.call(None, "refuse", 1), link.call(int, "same", 2)
    ends = await asyncio.gather(failing, fine, return_exceptions=True)
    assert isinstance(ends[0], CallError)
    assert str(ends[0]) == "ValueError: reservation x is in use"
    assert ends[1] == 2
    with pytest.raises(CallError, match="Expected `int`"):
        await link.call(None, "refuse", "one")


async def test_who_has_no_token_is_not_heard(serve: Serve) -> None:
    heard = []

    async def hear(value: int) -> None:
        heard.append(value)

    address = await serve(hear=(tuple[int], hear))
    with pytest.raises(ConnectionError):
        await link_to(replace(address, token=bytes(TOKEN_BYTES))).call(None, "hear", 1)
    assert heard == []


async def test_calls_to_a_coordinator_that_ends_fail_at_once_and_later_ones_reach_the_next(serve: Serve) -> None:
    addresses: list[Address] = []

    async def find() -> Address:
        return addresses[-1]

    async def never() -> None:
        await asyncio.Event().wait()

    first = Listener({"never": (tuple[()], never)})
    addresses.append(await first.start("127.0.0.1"))
    link = Link(find)
    waiting = asyncio.create_task(link.call(None, "never"))
    await asyncio.sleep(0.1)
    first.stop()
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(2):
            await waiting
    with pytest.raises(ConnectionError):
        await link.call(None, "never")
    addresses.append(await serve(same=(tuple[int], same)))
    assert await link.call(int, "same", 1) == 1


async def test_while_a_coordinator_is_being_started_calls_do_not_wait_for_it(serve: Serve) -> None:
    address = await serve(same=(tuple[int], same))
    is_there = asyncio.Event()

    async def find() -> Address:
        await is_there.wait()
        return address

    link = Link(find)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ConnectionError, match="not to be reached"):
        await link.call(int, "same", 1)
    waited = loop.time()
    for _ in range(10):
        with pytest.raises(ConnectionError):
            await link.call(int, "same", 1)
    assert loop.time() - waited < PATIENT_SECONDS / 2 < waited - began < 2 * PATIENT_SECONDS
    is_there.set()
    await asyncio.sleep(0.1)
    assert await link.call(int, "same", 2) == 2


async def test_an_attempt_that_took_long_is_used_and_none_is_made_beside_it(serve: Serve) -> None:
    address = await serve(same=(tuple[int], same))
    finds = 0

    async def find() -> Address:
        nonlocal finds
        finds += 1
        await asyncio.sleep(1.3 * PATIENT_SECONDS)
        return address

    link = Link(find)
    with pytest.raises(ConnectionError, match="not to be reached"):
        await link.call(int, "same", 1)
    await asyncio.sleep(0.5 * PATIENT_SECONDS)
    assert await link.call(int, "same", 2) == 2
    assert finds == 1


async def test_a_coordinator_that_stood_still_hears_the_reports_that_wait_before_leases_end() -> None:
    coordinator = Coordinator(CoordinatorSettings(lease_seconds=0.5), "m")
    link = Link(coordinator.address)
    await link.call(None, "report", report(1, free=10))
    placed, _ = await link.call(DecisionPair, "acquire", demand("a"), None)
    held = replace(report(2, free=9), held_blocks={"a": 1})
    await link.call(None, "report", held)
    await asyncio.sleep(0.25)
    sent = asyncio.create_task(link.call(None, "report", replace(held, sequence=3)))
    await asyncio.sleep(0)
    time.sleep(1)  # noqa: ASYNC251 - the whole process stands still, event loop included
    await sent
    await asyncio.sleep(0.2)
    (known,) = json.loads(await link.call(bytes, "status"))["replicas"]
    # Booked anew as a stranger it would have the bound of a request that fills the pool.
    assert (placed.replica, known["reservations"], known["headroom_blocks"]) == ("r1", 1, 0)
    assert json.loads(await link.call(bytes, "status"))["lease_expirations"] == 0


async def test_a_router_that_dies_leaves_nobody_in_the_queue() -> None:
    coordinator = Coordinator(CoordinatorSettings(queue_deadline_seconds=60), "m")
    link, dying = Link(coordinator.address), Link(coordinator.address)
    await link.call(None, "report", report(1, free=10))
    placed, _ = await link.call(DecisionPair, "acquire", demand("a"), None)
    assert placed.replica == "r1"
    waiting = asyncio.create_task(dying.call(DecisionPair, "acquire", demand("b"), None))
    await asyncio.sleep(0.1)
    assert b'"queued_blocks":10' in (await link.call(bytes, "status")).replace(b" ", b"")
    dying.close()
    with pytest.raises(ConnectionError):
        await waiting
    await asyncio.sleep(0.1)
    assert b'"queued_blocks":0' in (await link.call(bytes, "status")).replace(b" ", b"")
    link.close()
