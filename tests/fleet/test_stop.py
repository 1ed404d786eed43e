"""The end of a fleet."""

import subprocess
import sys
import time

import psutil

from tests.fleet.conftest import STOP_SECONDS, RunningFleet

BETWEEN_KILLS_SECONDS = 2.0


def test_ctrl_c_stops_the_fleet_and_leaves_no_process(fleet: RunningFleet) -> None:
    family = fleet.family()
    names = " ".join(process.name() for process in family)
    assert "haproxy" in names
    assert "raylet" in names
    assert fleet.stop() == 0, fleet.log.read_text()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert "Traceback" not in fleet.log.read_text()


def test_a_polite_kill_stops_a_fleet_that_takes_long_to_stop_and_a_second_one_changes_nothing() -> None:
    """A race as well: where a thread still waited for Serve, Ray ended the process in one of two runs."""
    command = [sys.executable, "-m", "tests.fleet.busy_fleet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as busy:
        assert busy.stdout is not None
        assert busy.stdout.readline() == "up\n", busy.communicate()[1]
        family = psutil.Process(busy.pid).children(recursive=True)
        names = [process.name() for process in family]
        busy.terminate()
        time.sleep(BETWEEN_KILLS_SECONDS)
        busy.terminate()
        output, errors = busy.communicate(timeout=STOP_SECONDS)
    assert (busy.returncode, output) == (0, "stopped\n"), errors
    assert "raylet" in names
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
