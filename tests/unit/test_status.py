"""`trifleet status`: what is drawn of the fleet's JSON."""

import io
import json
from dataclasses import asdict

from rich.console import Console

from deploy.admission import Admission
from deploy.messages import Demand
from deploy.settings import CoordinatorSettings
from deploy.status import BAR_CELLS, bar, compactions_per_minute, draw
from tests.unit.reports import report


def fleet(compactions=0):
    core = Admission(CoordinatorSettings())
    core.observe(report("a", 1, total=100, held={"x": 30}, max_model_len=1600, running=1, compactions=compactions), 0)
    core.observe(report("silent", 1, total=100), -10)
    core.submit(Demand("y", 100, 640), 0)
    core.observe(report("a", 2, total=100, held={"x": 30}, max_model_len=1600, running=1, compactions=compactions), 0)
    return json.loads(json.dumps(asdict(core.snapshot(0)), default=str))


def of(name, seen):
    (found,) = [replica for replica in seen["replicas"] if replica["replica"] == name]
    return found


def cells(text):
    return {str(span.style): span.end - span.start for span in text.spans}


def test_the_bar_is_always_full_width_and_in_proportion():
    replica = {"engine": {"total_blocks": 100}, "held_blocks": 30, "reserved_blocks": 20, "predicted_blocks": 10}
    assert len(bar(replica).plain) == BAR_CELLS
    assert cells(bar(replica)) == {"cyan": 9, "yellow": 6, "magenta": 3, "bright_black": 12}


def test_promises_beyond_the_pool_do_not_burst_the_bar():
    replica = {"engine": {"total_blocks": 100}, "held_blocks": 90, "reserved_blocks": 50, "predicted_blocks": 10}
    assert len(bar(replica).plain) == BAR_CELLS
    assert cells(bar(replica)) == {"cyan": 27, "yellow": 3}


def test_the_pace_of_compactions_is_that_between_two_readings_of_the_same_engine():
    assert compactions_per_minute(fleet(10), fleet(16), seconds=2)["a"] == 180
    restarted = fleet(3)
    of("a", restarted)["epoch"] = "second"
    assert "a" not in compactions_per_minute(fleet(10), restarted, seconds=2)


def test_every_replica_has_its_row_and_the_silent_one_says_so():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(draw("http://somewhere", fleet(), {}))
    lines = console.export_text().splitlines()
    (row,) = [line for line in lines if line.startswith("a ")]
    assert "of 100" in row
    assert "█" * BAR_CELLS in row
    assert any(line.startswith("silent silent") for line in lines)
    assert any("Placed so far: 1" in line for line in lines)
