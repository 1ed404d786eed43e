"""Hostile requests and two faults in the real fleet; `trifleet bench fuzz` and `bench chaos` do many more and all."""

import asyncio
from typing import Any

import pytest

from benchmarks.chaos import strike
from benchmarks.faults import FAULTS
from benchmarks.fuzz import attack
from tests.fleet.conftest import MODEL, RunningFleet


def test_hostile_requests_meet_no_5xx_and_leave_nothing(fleet: RunningFleet) -> None:
    figures = asyncio.run(attack(fleet.url, cases=70, seed=8))
    print(f"{figures['cases']} hostile requests: {figures['statuses']}")
    assert figures["unexpected_5xx"] == 0, figures["examples"]
    assert figures["hung"] == figures["leaked_blocks"] == figures["leaked_reservations"] == 0
    assert figures["statuses"]["200"] > 3  # about one in five is valid


@pytest.mark.parametrize("fault", ["coordinator_killed", "engine_killed"])
def test_a_fault_fails_nothing_silently_and_the_fleet_becomes_whole(fleet: RunningFleet, fault: str) -> None:
    figures: dict[str, Any] = asyncio.run(strike(fleet.url, MODEL, 2, fleet.family, FAULTS[fault]))
    assert figures["requests"] > figures["requests_before"]
    assert figures["answered"] > 0
    assert figures["failed_silent"] == figures["hung"] == figures["failed_unstreamed"] == 0, figures["failures"]
    assert figures["recovery_seconds"] is not None
    assert figures["leaked_blocks"] == figures["leaked_reservations"] == 0
    assert figures["leftover_processes"] == []
