"""A real Prometheus watches the real fleet under load: every query of every panel, rule and alert has data.

`make observability-check` runs this and leaves `observability.json`.
"""

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

import bundled
from tests.fleet.conftest import RunningFleet
from tests.observability.check import check
from tests.observability.debian import ProgramMissing, tool

WATCH_SECONDS = 45


def keep_busy(fleet: RunningFleet, stop: threading.Event, number: int) -> None:
    """One user: long and short requests in turn, until told to stop."""
    client = fleet.client()
    for seed in range(number, 100_000, 100):
        if stop.is_set():
            return
        content = bundled.demo_prompt(seed, 1000) if seed % 200 < 100 else bundled.short_prompt(seed)
        message = {"role": "user", "content": content}
        client.chat.completions.create(model="tiny-walker", messages=[message], max_tokens=1100, temperature=0)


def test_every_query_of_every_panel_rule_and_alert_has_data_under_load(fleet: RunningFleet) -> None:
    try:
        tool("prometheus", "prometheus")
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    stop = threading.Event()
    users = [threading.Thread(target=keep_busy, args=(fleet, stop, number)) for number in range(8)]
    for user in users:
        user.start()
    try:
        result = check(f"{fleet.url}/metrics", WATCH_SECONDS)
    finally:
        stop.set()
        for user in users:
            user.join()
    Path(os.environ.get("OBSERVABILITY_JSON", os.devnull)).write_text(json.dumps(asdict(result), indent=2))
    assert result.queries_empty == 0, result.empty
    assert result.queries > 100
    fleet.await_whole_pool(seconds=5)
