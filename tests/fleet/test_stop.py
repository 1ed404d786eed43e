"""The end of a fleet."""

import subprocess
import sys

import psutil

from tests.fleet.conftest import RunningFleet


def test_ctrl_c_stops_the_fleet_and_leaves_no_process(fleet: RunningFleet) -> None:
    family = fleet.family()
    names = " ".join(process.name() for process in family)
    assert "haproxy" in names
    assert "raylet" in names
    assert fleet.stop() == 0, fleet.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert "Traceback" not in fleet.log.read_text()


def test_what_takes_long_to_stop_does_not_end_the_process_that_stops_it() -> None:
    """A race: where a thread still waited for Serve, Ray ended it in one of two runs."""
    command = [sys.executable, "-m", "tests.fleet.busy_fleet"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout.splitlines()[-1:]) == (0, ["stopped"]), ended.stderr
