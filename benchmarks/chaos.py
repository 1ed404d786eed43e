"""Faults in a running fleet under steady load: `trifleet bench chaos`.

Streams run all the time while a fault (`faults.py`) strikes, and what becomes of every request is sorted into four:
answered whole, failed so that the client sees it, failed silently (a clean end without what was asked for), and hung.
Then the fleet must become whole by itself: every replica fresh, requests placed by the coordinator again, and, when the
load ends, no block, no reservation and no process left over.
"""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import httpx

from benchmarks.faults import DISK_FULL, FAULTS, NODE_REMOVED, Family, Fault, family_here, title, two_nodes
from benchmarks.machine import machine
from deploy.fleet import running_fleet
from deploy.keys import key_header
from deploy.settings import FleetSettings, load_settings

CLIENTS = 4
TOKENS = 200
BEFORE_SECONDS = 5.0
HUNG_SECONDS = 120.0
"""No byte for so long is a hang: so few clients never wait for each other, and Ray misses a process much sooner."""
STEADY_SECONDS = 8.0
"""The fleet has recovered when it was whole for so long; what counts is when that began."""
RECOVERY_SECONDS = 300.0
SETTLE_SECONDS = 90.0

PARTS = ("VLLM::EngineCore", "ray::ServeReplica", "ray::Coordinator", "ray::HAProxyManager", "haproxy")
"""The beginnings of the titles of a fleet's processes, or of their program's name."""


class End(Enum):
    WHOLE = "answered"
    VISIBLE = "failed_visible"
    SILENT = "failed_silent"
    HUNG = "hung"


@dataclass(frozen=True)
class Outcome:
    end: End
    is_streamed: bool
    """Whether tokens had arrived."""
    sentence: str = ""


def bench_chaos(settings_file: Path, faults: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The figures of the command so far, after every fault: one fleet, fault after fault; one of its own for what needs
    another machine."""
    from benchmarks.small_disk import strike_on_a_small_disk

    settings = load_settings(settings_file)
    rows: dict[str, Any] = {}
    figures = machine("vllm", "ray", "torch") | {"clients": CLIENTS, "tokens_per_request": TOKENS, "faults": rows}
    if here := [name for name in faults if name in FAULTS]:
        with running_fleet(settings) as url:
            for name in here:
                rows[name] = strike_here(url, settings, FAULTS[name])
                yield figures
    if NODE_REMOVED in faults:
        start, node_removed = two_nodes()
        with running_fleet(settings, start_ray=start) as url:
            rows[NODE_REMOVED] = strike_here(url, settings, node_removed)
            yield figures
    if DISK_FULL in faults:
        rows[DISK_FULL] = strike_on_a_small_disk(settings_file)
        yield figures


def strike_here(url: str, settings: FleetSettings, fault: Fault) -> dict[str, Any]:
    """One fault in a fleet that this process has started."""
    return asyncio.run(strike(url, settings.served_model_name, settings.replicas, family_here, fault))


async def strike(url: str, model: str, replicas: int, family: Family, fault: Fault) -> dict[str, Any]:
    """One fault under load, until the fleet is whole and idle again."""
    outcomes: list[Outcome] = []
    is_on = True

    async def client() -> None:
        async with httpx.AsyncClient(timeout=HUNG_SECONDS, headers=key_header()) as http:
            while is_on:
                outcome = await _request(http, url, model)
                outcomes.append(outcome)
                if outcome.end is not End.WHOLE:
                    await asyncio.sleep(0.5)

    census = _census(family)
    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await asyncio.sleep(BEFORE_SECONDS)
    answered_before = len(outcomes)
    began = time.monotonic()
    victim = await fault(family())
    recovered_at = await _recovered(url, model, replicas)
    is_on = False
    await asyncio.gather(*clients)
    held, reserved = await settled(url)
    failed = [outcome for outcome in outcomes if outcome.end is End.VISIBLE]
    return {
        "victim": victim,
        "requests": len(outcomes),
        "requests_before": answered_before,
        **{end.value: sum(outcome.end is end for outcome in outcomes) for end in End},
        "failed_unstreamed": sum(not outcome.is_streamed for outcome in failed),
        "failures": sorted({outcome.sentence for outcome in outcomes if outcome.sentence}),
        "recovery_seconds": None if recovered_at is None else round(recovered_at - began, 1),
        "leaked_blocks": held,
        "leaked_reservations": reserved,
        "leftover_processes": await _leftovers(family, census),
    }


async def _request(http: httpx.AsyncClient, url: str, model: str) -> Outcome:
    body = {
        "model": model, "prompt": "once upon", "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    tokens, is_done, is_streamed = 0, False, False
    try:
        async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Outcome(End.VISIBLE, False, f"HTTP {response.status_code}: {text[:160]}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return Outcome(End.VISIBLE, is_streamed, "an error event")
                    is_streamed = is_streamed or bool(event["choices"])
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.ReadTimeout:
        return Outcome(End.HUNG, is_streamed, f"no byte for {HUNG_SECONDS:g} s")
    except httpx.HTTPError as error:
        return Outcome(End.VISIBLE, is_streamed, type(error).__name__)
    except ValueError:
        return Outcome(End.SILENT, is_streamed, "a clean end within a line")
    if is_done and tokens == TOKENS:
        return Outcome(End.WHOLE, True)
    return Outcome(End.SILENT, is_streamed, f"a clean end after {tokens} of {TOKENS} tokens")


async def _recovered(url: str, model: str, replicas: int) -> float | None:
    """When the fleet began to be whole for STEADY_SECONDS; None if it does not."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    since: float | None = None
    async with httpx.AsyncClient(timeout=10, headers=key_header()) as http:
        while (now := time.monotonic()) < deadline:
            if not await _is_whole(http, url, model, replicas):
                since = None
            elif since is None:
                since = now
            elif now - since >= STEADY_SECONDS:
                return since
            await asyncio.sleep(0.5)
    return None


async def _is_whole(http: httpx.AsyncClient, url: str, model: str, replicas: int) -> bool:
    """Every replica reports to the coordinator and is reached by the router, and a request is answered."""
    try:
        known = (await http.get(f"{url}/fleet")).json()["replicas"]
        if sum(replica["fresh"] and replica["reachable"] for replica in known) != replicas:
            return False
        body = {"model": model, "prompt": "once", "max_tokens": 1}
        answer = await http.post(f"{url}/v1/completions", json=body)
        return answer.status_code == 200 and "trifleet" in answer.json()["usage"]
    except (httpx.HTTPError, ValueError, KeyError):
        return False


async def settled(url: str) -> tuple[int | None, int | None]:
    """(blocks, reservations) still held when the load has ended and some time has passed; None where the fleet does not
    tell."""
    deadline = time.monotonic() + SETTLE_SECONDS
    held: int | None = None
    reserved: int | None = None
    async with httpx.AsyncClient(timeout=30, headers=key_header()) as http:
        while time.monotonic() < deadline and not held == reserved == 0:
            await asyncio.sleep(0.5)
            held = reserved = None
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                known = (await http.get(f"{url}/fleet")).json()["replicas"]
                held = sum(replica["engine"]["total_blocks"] - replica["engine"]["free_blocks"] for replica in known)
                reserved = sum(replica["reservations"] for replica in known)
    return held, reserved


def _census(family: Family) -> Counter[str]:
    """How many processes of each part the fleet has."""
    words = [title(process).split(" ")[0] for process in family()]
    names = [word if word.startswith(PARTS) else Path(word).name for word in words]
    return Counter(part for part in PARTS for name in names if name.startswith(part))


async def _leftovers(family: Family, before: Counter[str]) -> list[str]:
    """The parts of which there are more processes than before, when some time has passed."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while extra := _census(family) - before:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    return sorted(extra.elements())
