"""Faults in a running fleet under steady load: `trifleet bench chaos`.

Streams run all the time; a part of the fleet is killed or stopped by its process id, and what becomes of every request
is sorted into four: answered whole, failed so that the client sees it, failed silently (a clean end without what was
asked for), and hung. Then the fleet must become whole by itself: every replica fresh, requests placed by the
coordinator again, and, when the load ends, no block and no reservation left.
"""

import asyncio
import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import machine
from deploy.fleet import running_fleet
from deploy.settings import load_settings

CLIENTS = 4
TOKENS = 200
BEFORE_SECONDS = 5.0
HUNG_SECONDS = 120.0
"""No byte for so long is a hang: longer than any queue's deadline here, and than Ray takes to miss a process."""
STEADY_SECONDS = 8.0
"""The fleet has recovered when it was whole for so long; what counts is when that began."""
RECOVERY_SECONDS = 300.0
SETTLE_SECONDS = 90.0

Family = Callable[[], list[psutil.Process]]
"""Every process of the fleet, now."""


@dataclass(frozen=True)
class Fault:
    """`title`: a pattern of the victim's command line; the newest one is hit."""

    title: str
    stopped_seconds: float | None = None
    """None: killed with SIGKILL. Otherwise stopped, and continued after that."""


FAULTS = {
    "engine_killed": Fault(r"^VLLM::EngineCore"),
    "replica_killed": Fault(r"^ray::ServeReplica:trifleet:replica"),
    "coordinator_killed": Fault(r"^ray::Coordinator"),
    "router_killed": Fault(r"^ray::ServeReplica:trifleet:router"),
    "haproxy_killed": Fault(r"^\S*/haproxy\b.* -f "),
    "haproxy_parent_killed": Fault(r"^ray::HAProxyManager"),
    "replica_stopped": Fault(r"^ray::ServeReplica:trifleet:replica", stopped_seconds=15.0),
    # Whatever is on its way to it arrives that much later.
    "reports_delayed": Fault(r"^ray::Coordinator", stopped_seconds=5.0),
}


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


def bench_chaos(settings_file: Path, faults: Sequence[str]) -> dict[str, Any]:
    """The figures of the command: one fleet, fault after fault."""
    settings = load_settings(settings_file)
    about = machine("vllm", "ray", "torch")
    rows = {}
    with running_fleet(settings) as url:
        for name in faults:
            rows[name] = asyncio.run(
                strike(url, settings.served_model_name, settings.replicas, _children, FAULTS[name])
            )
    return about | {"clients": CLIENTS, "tokens_per_request": TOKENS, "faults": rows}


async def strike(url: str, model: str, replicas: int, family: Family, fault: Fault) -> dict[str, Any]:
    """One fault under load, until the fleet is whole and idle again."""
    outcomes: list[Outcome] = []
    is_on = True

    async def client() -> None:
        async with httpx.AsyncClient(timeout=HUNG_SECONDS) as http:
            while is_on:
                outcome = await _request(http, url, model)
                outcomes.append(outcome)
                if outcome.end is not End.WHOLE:
                    await asyncio.sleep(0.5)

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    await asyncio.sleep(BEFORE_SECONDS)
    answered_before = len(outcomes)
    victim = _victim(family(), fault)
    began = time.monotonic()
    if fault.stopped_seconds is None:
        victim.kill()
    else:
        victim.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.stopped_seconds)
        finally:
            victim.send_signal(signal.SIGCONT)
    recovered_at = await _recovered(url, model, replicas)
    is_on = False
    await asyncio.gather(*clients)
    held, reserved = await settled(url)
    failed = [outcome for outcome in outcomes if outcome.end is End.VISIBLE]
    return {
        "victim": _title(victim) if victim.is_running() else fault.title,
        "requests": len(outcomes),
        "requests_before": answered_before,
        **{end.value: sum(outcome.end is end for outcome in outcomes) for end in End},
        "failed_unstreamed": sum(not outcome.is_streamed for outcome in failed),
        "failures": sorted({outcome.sentence for outcome in outcomes if outcome.sentence}),
        "recovery_seconds": None if recovered_at is None else round(recovered_at - began, 1),
        "leaked_blocks": held,
        "leaked_reservations": reserved,
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
    if is_done and tokens == TOKENS:
        return Outcome(End.WHOLE, True)
    return Outcome(End.SILENT, is_streamed, f"a clean end after {tokens} of {TOKENS} tokens")


async def _recovered(url: str, model: str, replicas: int) -> float | None:
    """When the fleet began to be whole for STEADY_SECONDS; None if it does not."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    since: float | None = None
    async with httpx.AsyncClient(timeout=10) as http:
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
    """Every replica reports, and a request is placed by the coordinator: then its usage says what it took."""
    try:
        known = (await http.get(f"{url}/fleet")).json()["replicas"]
        if sum(replica["fresh"] and replica["reachable"] for replica in known) != replicas:
            return False
        body = {"model": model, "prompt": "once", "max_tokens": 1}
        answer = await http.post(f"{url}/v1/completions", json=body)
        return answer.status_code == 200 and "trifleet" in answer.json()["usage"]
    except (httpx.HTTPError, ValueError, KeyError):
        return False


async def settled(url: str) -> tuple[int, int]:
    """(blocks, reservations) still held when the load has ended and some time has passed."""
    deadline = time.monotonic() + SETTLE_SECONDS
    async with httpx.AsyncClient(timeout=30) as http:
        while True:
            known = (await http.get(f"{url}/fleet")).json()["replicas"]
            held = sum(replica["engine"]["total_blocks"] - replica["engine"]["free_blocks"] for replica in known)
            reserved = sum(replica["reservations"] for replica in known)
            if (held == 0 and reserved == 0) or time.monotonic() > deadline:
                return held, reserved
            await asyncio.sleep(0.5)


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _victim(family: list[psutil.Process], fault: Fault) -> psutil.Process:
    found = [process for process in family if re.search(fault.title, _title(process))]
    if not found:
        raise LookupError(f"no process of the fleet is named {fault.title}")
    return max(found, key=lambda process: process.create_time())


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
