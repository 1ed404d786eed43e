"""`trifleet bench soak` for two minutes, with a fleet of its own, when the one of the other tests has stopped."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.soak import CONCURRENCY
from deploy.cli import LOCAL
from deploy.haproxy import free_ports

DEADLINE_SECONDS = 600
OPEN_FILES = 4 * CONCURRENCY
"""What connections of the load may be open when files are counted: HAProxy has two for a request."""


def test_two_minutes_of_mixed_load_lose_nothing_and_nothing_piles_up(tmp_path: Path) -> None:
    settings = yaml.safe_load(LOCAL.read_text())
    settings["http"]["port"] = free_ports(1)[0]
    file, out = tmp_path / "fleet.yaml", tmp_path / "soak.json"
    file.write_text(yaml.safe_dump(settings))
    command = [Path(sys.executable).parent / "trifleet", "bench", "soak", "--minutes", "2", "-f", file, "--json", out]
    subprocess.run(command, check=True, timeout=DEADLINE_SECONDS)
    figures = json.loads(out.read_text())
    assert figures["errors"] == 0, figures["error_sentences"]
    assert figures["leaked_blocks"] == figures["leaked_reservations"] == 0
    assert figures["requests_to_their_end"] > 0
    assert figures["clients_that_left"] > 0
    assert figures["requests_refused_as_they_must"] > 0
    assert figures["compactions"] > 0
    assert figures["metrics_series_last"] <= figures["metrics_series_first"]
    processes = figures["processes"]
    assert sum(name.startswith("VLLM") for name in processes) == 2
    for name, row in processes.items():
        print(f"{name}: {row['rss_mb_last']} MB, {row['rss_slope_mb_per_hour']:+} MB an hour")
        assert row["open_files_last"] <= row["open_files_first"] + OPEN_FILES, name
