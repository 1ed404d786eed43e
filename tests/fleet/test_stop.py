"""The end of a fleet."""

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
