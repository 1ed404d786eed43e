"""A real Prometheus watches the real fleet under load: every query of every panel, rule and alert has data.

`make observability-check` runs this and leaves `observability.json`.
"""

import json
import os
import re
import threading
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import yaml

import bundled
from tests.fleet.conftest import MODEL, RunningFleet
from tests.observability.browser import running_chromium
from tests.observability.check import check
from tests.observability.debian import ProgramMissing, tool
from tests.observability.prometheus import running_prometheus

WATCH_SECONDS = 45
RAY_SECONDS = 60  # Ray exports every 10 s; a busy machine takes longer
DOCUMENT = Path(__file__).parents[2] / "docs" / "observability.md"


def keep_busy(fleet: RunningFleet, stop: threading.Event, number: int) -> None:
    """One user: long and short requests in turn, until told to stop."""
    client = fleet.client()
    for seed in range(number, 100_000, 100):
        if stop.is_set():
            return
        content = bundled.demo_prompt(seed, 1000) if seed % 200 < 100 else bundled.short_prompt(seed)
        message = {"role": "user", "content": content}
        client.chat.completions.create(model=MODEL, messages=[message], max_tokens=1100, temperature=0)


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


def test_a_browser_draws_the_real_fleet(fleet: RunningFleet) -> None:
    try:
        tool("chromium", "chromium")
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    with running_chromium() as page:
        page.look_as(1180, 860)
        page.open(f"{fleet.url}/fleet")
        page.wait_for("document.querySelectorAll('.replica').length === 2")
        before = fleet.samples()["triattention_compactions_total"]
        keep_busy_once = threading.Thread(target=one_long_request, args=(fleet,))
        keep_busy_once.start()
        shown = "Number(document.querySelector('#compactions').textContent.replaceAll(',', ''))"
        page.wait_for(f"{shown} > {before}", seconds=60)
        keep_busy_once.join()
        assert page.evaluate("document.querySelector('#subtitle').textContent") == f"{MODEL}, 2 replicas"
        assert page.complaints == []


def one_long_request(fleet: RunningFleet) -> None:
    message = {"role": "user", "content": bundled.demo_prompt(7, 1000)}
    fleet.client().chat.completions.create(model=MODEL, messages=[message], max_tokens=1100, temperature=0)


def test_a_nodes_ray_metrics_show_the_same_names_through_the_documented_relabeling(fleet: RunningFleet) -> None:
    try:
        tool("prometheus", "prometheus")
    except ProgramMissing as missing:
        pytest.skip(str(missing))
    snippet = DOCUMENT.read_text().split("```yaml\nmetric_relabel_configs:")[1].split("```")[0]
    own = {"__name__", "cluster", "instance", "job", "le", "model", "reason", "replica", "tier", "class"}
    with running_prometheus(ray_metrics_url(fleet), relabeling=yaml.safe_load(snippet)) as prometheus:
        deadline = time.monotonic() + RAY_SECONDS
        while not prometheus.query("vllm:num_requests_running and on () trifleet_free_blocks", time.time()):
            assert time.monotonic() < deadline, "Ray's page does not show the fleet"
            time.sleep(1)
        now = time.time()
        ours = prometheus.query('{__name__=~"(trifleet|triattention)_.+"}', now)
        engines = prometheus.query("vllm:num_requests_running", now)
    there = {(series["metric"]["__name__"], series["metric"].get("replica")) for series in ours}
    page = httpx.get(f"{fleet.url}/metrics").text
    samples = re.findall(r'(?m)^(\w+)\{(?:.*?replica="(\w+)")?', page)
    assert there == {(name, replica or None) for name, replica in samples}
    assert {label for series in ours for label in series["metric"]} <= own
    assert len({series["metric"]["replica"] for series in engines}) == 2


def ray_metrics_url(fleet: RunningFleet) -> str:
    """Ray chooses a free port on a local node and writes it into its session's folder."""
    arguments = [argument for process in fleet.family() for argument in process.cmdline()]
    session = next(found.group() for argument in arguments if (found := re.search(r"/\S+/session_[0-9_-]+", argument)))
    (port,) = Path(session).glob("metrics_export_port_*")
    return f"http://127.0.0.1:{port.read_text()}/metrics"
