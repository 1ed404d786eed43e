"""Replicas that die, fall silent, stop and start under load: real Ray Serve and HAProxy, fake engines.

Each way in which fleets of this kind lose requests is a test here: a replica that dies before its first byte, in the
middle of an answer, that falls silent, or that is stopped because the fleet shrinks. This fleet takes nobody without a
key.
"""

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deploy.haproxy import free_ports
from tests.fleet.conftest import MODEL, START_SECONDS, RunningFleet

ROOT = Path(__file__).parents[2]
KEY, GOLD_KEY, ADMIN_KEY = "tf-of-anybody", "sk-of-gold", "sk-of-the-admin"


def line_of(key: str) -> str:
    """Of a keys file."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()} default\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """One to three replicas with fake engines."""
    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "keys").write_text(line_of(KEY))
    settings = {
        "model": "bundled",
        "served_model_name": MODEL,
        "replicas": 1,
        "cpus_per_replica": 0.1,
        "engine": {"max_model_len": 2048},
        "coordinator": {
            "queue_deadline_seconds": 60,
            "stale_report_seconds": 1,
            "short_request_tokens": 0,
            "lease_seconds": 3,
        },
        "autoscaling": {
            "max_replicas": 3,
            "target_utilization": 0.7,
            "upscale_delay_seconds": 0.5,
            "downscale_delay_seconds": 4,
        },
        "tiers": {"gold": {"keys": ["env:GOLD_KEY"], "max_context_tokens": 200, "priority": -1, "share": 4}},
        "access": {"required": True, "keys_file": str(folder / "keys"), "admin_keys": ["env:ADMIN_KEY"]},
        "drain_seconds": 60,
        "http": {"port": port},
    }
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump(settings))
    log = folder / "up.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GOLD_KEY": GOLD_KEY, "ADMIN_KEY": ADMIN_KEY}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fleet.fake_fleet", str(file)],
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT, env=environment,
        )  # fmt: skip
    running = RunningFleet(process, f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ctrl-C stops it" not in log.read_text():
            assert process.poll() is None, f"the fleet ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the fleet is not ready:\n{log.read_text()}"
            time.sleep(0.5)
        yield running
    finally:
        if process.poll() is None:
            running.stop()


class Client:
    def __init__(self, fleet: RunningFleet) -> None:
        self.http = httpx.AsyncClient(
            base_url=fleet.url, timeout=120, limits=httpx.Limits(max_connections=200), headers=bearer(KEY)
        )

    async def fleet(self) -> dict[str, Any]:
        """As any replica tells it; one that is just going cannot, nor can HAProxy while there is none."""
        deadline = time.monotonic() + 60
        while True:
            answer = await self.http.get("/fleet", headers=bearer(ADMIN_KEY))
            if answer.status_code == 200:
                told: dict[str, Any] = answer.json()
                return told
            assert time.monotonic() < deadline, answer.text
            await asyncio.sleep(0.2)

    async def complete(self, words: int, prompt: str = "go", key: str = KEY) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": words}
        return await self.http.post("/v1/completions", json=body, headers=bearer(key))

    @contextlib.asynccontextmanager
    async def stream(self, words: int, prompt: str = "go") -> AsyncIterator[AsyncIterator[str]]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": words, "stream": True}
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            yield response.aiter_lines()

    async def replicas(self, count: int, seconds: float) -> list[dict[str, Any]]:
        """Wait until so many replicas take requests."""
        deadline = time.monotonic() + seconds
        while True:
            known = (await self.fleet())["replicas"]
            able = [replica for replica in known if replica["fresh"] and replica["reachable"]]
            if len(able) == count:
                return able
            assert time.monotonic() < deadline, f"{len(able)} of {count} replicas: {known}"
            await asyncio.sleep(0.2)

    async def settled(self) -> None:
        """Wait until there is one replica, with nothing on it, and what HAProxy sends comes by way of the router: one
        that waits in an HAProxy process of before a replica's replacement may still go past it."""
        await self.replicas(1, 60)
        deadline = time.monotonic() + 20
        while "trifleet" not in (await self.complete(words=1)).json()["usage"]:
            assert time.monotonic() < deadline, "HAProxy does not ask the router"
            await asyncio.sleep(0.5)
        await self.replicas(1, 60)
        await self.running(0)

    async def running(self, count: int, seconds: float = 10) -> None:
        """Wait until the reports show so many requests."""
        deadline = time.monotonic() + seconds
        while sum(r["engine"]["running"] for r in (await self.fleet())["replicas"] if r["fresh"]) != count:
            assert time.monotonic() < deadline, await self.fleet()
            await asyncio.sleep(0.1)

    async def queued(self, count: int, seconds: float) -> None:
        """Wait until so many long requests wait."""
        deadline = time.monotonic() + seconds
        while (await self.fleet())["queue_length"]["long"] != count:
            assert time.monotonic() < deadline, await self.fleet()
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
async def client(fakes: RunningFleet) -> AsyncIterator[Client]:
    made = Client(fakes)
    await made.settled()
    yield made
    await made.http.aclose()


async def collect(lines: AsyncIterator[str], into: list[str]) -> None:
    async for line in lines:
        into.append(line)


async def process_of(fleet: RunningFleet, deployment: str) -> psutil.Process:
    """The deployment's process. Waits until it is the only one: others may still drain, or start and not be needed."""
    title = f"ray::ServeReplica:trifleet:{deployment}"
    deadline = time.monotonic() + 60
    while True:
        found = []
        for process in fleet.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if title in " ".join(process.cmdline()) else []
        if len(found) == 1:
            return found[0]
        assert time.monotonic() < deadline, f"{len(found)} processes of {deployment}"
        await asyncio.sleep(0.5)


async def test_the_fleet_grows_to_three_and_shrinks_to_one_under_load_without_a_failed_request(client: Client) -> None:
    answers: list[httpx.Response] = []
    load_is_on = True

    async def user() -> None:
        while load_is_on:
            answers.append(await client.complete(words=150))

    # Each holds up to 11 of 40 blocks for three seconds: one replica serves three at a time.
    users = [asyncio.create_task(user()) for _ in range(9)]
    await client.replicas(3, 60)
    deadline = time.monotonic() + 60
    while len(answers) < 20:
        assert time.monotonic() < deadline, f"three replicas gave {len(answers)} answers"
        await asyncio.sleep(0.2)
    placed = {name: sum(reasons.values()) for name, reasons in (await client.fleet())["placements"].items()}
    assert len([count for count in placed.values() if count]) == 3
    # One long stream on each replica: whichever goes away has something to finish.
    load_is_on = False
    await asyncio.gather(*users)
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(client.stream(words=600)) for _ in range(3)]
        firsts = [await anext(lines) for lines in streams]
        assert all(firsts)
        drained = asyncio.create_task(client.replicas(1, 60))
        trickle = []
        while not drained.done():
            trickle.append(await client.complete(words=5))
            await asyncio.sleep(0.2)
        await drained
        endings = [[line async for line in lines if line][-1] for lines in streams]
    assert endings == ["data: [DONE]"] * 3
    assert {answer.status_code for answer in (*answers, *trickle)} == {200}


async def test_a_replica_that_dies_before_its_first_byte_is_replaced_invisibly_and_once(
    fakes: RunningFleet, client: Client
) -> None:
    await client.settled()
    before = (await client.fleet())["retries"]
    process = await process_of(fakes, "replica")
    request = asyncio.create_task(client.complete(words=5, prompt="wait 3"))
    await client.running(1)
    process.kill()
    answer = await request
    assert answer.status_code == 200
    assert len(answer.json()["choices"][0]["text"].split()) == 5
    assert (await client.fleet())["retries"] == before + 1


async def test_a_replica_that_dies_in_the_middle_breaks_the_transfer(fakes: RunningFleet, client: Client) -> None:
    await client.settled()
    process = await process_of(fakes, "replica")
    async with client.stream(words=500) as lines:
        for _ in range(5):
            await anext(lines)
        process.kill()
        rest: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError):
            await collect(lines, rest)
        assert "data: [DONE]" not in rest
    # And nothing of it stays booked: the next ones find the fleet whole, as soon as there is a replica again.
    await client.settled()
    assert (await client.complete(words=3)).status_code == 200


async def test_a_silent_replica_gets_nothing_and_is_taken_back_when_it_speaks(
    fakes: RunningFleet, client: Client
) -> None:
    await client.settled()
    before = await client.fleet()
    process = await process_of(fakes, "replica")
    process.suspend()
    try:
        await asyncio.sleep(2)  # stale_report_seconds is 1
        waiting = asyncio.create_task(client.complete(words=3))
        await asyncio.sleep(1)
        assert not waiting.done(), "unknown is not full: it waits, and nobody refuses it"
    finally:
        process.resume()
    answer = await waiting
    assert answer.status_code == 200
    after = await client.fleet()
    waited = [now["tiers"]["default"]["counts"]["waits"]["long"]["sum_seconds"] for now in (before, after)]
    assert waited[1] - waited[0] > 0.5, f"it waited at the silent replica and not at the coordinator: {answer.text}"
    assert after["probes"] > before["probes"]


async def test_what_a_client_that_left_the_queue_is_given_ends_with_the_lease(client: Client) -> None:
    """HAProxy does not look at a client while it asks the router: the place is taken, and its lease runs out."""
    await client.settled()
    before = await client.fleet()
    # Each takes a whole replica for half a minute.
    running = [asyncio.create_task(client.complete(words=600, prompt="wait 30")) for _ in range(3)]
    try:
        await client.running(3, 60)
        leaving = asyncio.create_task(client.complete(words=600))
        await client.queued(1, 5)
        leaving.cancel()
    finally:
        for request in running:
            request.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    await client.queued(0, 20)
    deadline = time.monotonic() + 20
    while sum(replica["reservations"] for replica in (await client.fleet())["replicas"]):
        assert time.monotonic() < deadline, await client.fleet()
        await asyncio.sleep(0.2)
    assert (await client.fleet())["lease_expirations"] > before["lease_expirations"]
    assert (await client.complete(words=600)).status_code == 200


async def test_a_tiers_refusal_reaches_the_client(client: Client) -> None:
    await client.settled()
    answer = await client.complete(words=500, key=GOLD_KEY)
    assert answer.status_code == 400
    assert "gold" in answer.json()["error"]["message"]
    assert "200" in answer.json()["error"]["message"]
    assert (await client.complete(words=100, key=GOLD_KEY)).status_code == 200


async def test_a_tiers_key_is_metered_and_told_what_it_took(client: Client) -> None:
    await client.settled()
    await asyncio.sleep(1.5)  # until what the key took before is told
    before = (await client.fleet())["tiers"]["gold"]["usage"]
    answer = await client.complete(words=50, key=GOLD_KEY)
    told = answer.json()["usage"]["trifleet"]
    assert told["tier"] == "gold"
    assert told["kv_block_seconds"] > 1
    await asyncio.sleep(1.5)
    after = (await client.fleet())["tiers"]["gold"]["usage"]
    assert after["requests"] - before["requests"] == 1
    tokens = [sum(pace["output_tokens"] for pace in usage["pace"].values()) for usage in (before, after)]
    assert tokens[1] - tokens[0] == 50
    assert after["block_seconds"] - before["block_seconds"] == pytest.approx(told["kv_block_seconds"], rel=0.2)
    assert (await client.complete(words=5)).json()["usage"]["trifleet"]["tier"] == "default"


async def test_only_keys_get_in_each_to_its_own_and_a_new_one_at_once(fakes: RunningFleet, client: Client) -> None:
    await client.settled()
    answers = {key: await client.complete(words=2, key=key) for key in ("unknown", KEY, GOLD_KEY, "tf-new")}
    assert [answer.status_code for answer in answers.values()] == [401, 200, 200, 401]
    assert "API key" in answers["unknown"].json()["error"]["message"]
    for path, status in (("/fleet", 403), ("/metrics", 403), ("/v1/completions", 405), ("/-/healthz", 200)):
        assert (await client.http.get(path)).status_code == status, path
    async with httpx.AsyncClient(base_url=fakes.url) as stranger:
        for path, status in (("/fleet", 401), ("/metrics", 401), ("/v1/completions", 401), ("/-/healthz", 200)):
            assert (await stranger.get(path)).status_code == status, path
    assert (await client.http.get("/metrics", headers=bearer(ADMIN_KEY))).status_code == 200
    (fakes.log.parent / "keys").write_text(line_of(KEY) + line_of("tf-new"))
    assert (await client.complete(words=2, key="tf-new")).status_code == 200
    (fakes.log.parent / "keys").write_text(line_of(KEY))
    assert (await client.complete(words=2, key="tf-new")).status_code == 401
    assert (await client.fleet())["rejections"]["no_key"] >= 3


async def test_while_the_router_is_gone_requests_flow_and_it_comes_back(fakes: RunningFleet, client: Client) -> None:
    await client.settled()
    (await process_of(fakes, "router")).kill()
    answers = [await client.complete(words=2) for _ in range(5)]
    assert {answer.status_code for answer in answers} == {200}
    admitted = (await client.fleet())["admissions"]
    deadline = time.monotonic() + 180
    while (await client.fleet())["admissions"] == admitted:
        assert time.monotonic() < deadline, "the router is not back"
        assert (await client.complete(words=2)).status_code == 200
        await asyncio.sleep(0.5)
