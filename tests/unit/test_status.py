"""`trifleet status`: what is drawn of the fleet's JSON."""

import io
import json
import socket
import time
from dataclasses import asdict

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy.admission import Admission
from deploy.cli import app
from deploy.fleet import FleetError
from deploy.messages import Demand
from deploy.settings import CoordinatorSettings
from deploy.status import BAR_CELLS, bar, compactions_per_minute, draw, read_fleet, watch
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


def test_in_a_narrow_terminal_the_bar_gives_way_and_no_figure_is_cut():
    console = Console(width=80, record=True, file=io.StringIO())
    seen = fleet()
    of("a", seen)["replica"] = "g83conxy"
    console.print(draw("http://somewhere", seen, {"g83conxy": 1234.0}))
    (row,) = [line for line in console.export_text(clear=False).splitlines() if line.startswith("g83conxy ")]
    assert "of 100" in row
    assert "1,234" in row
    assert 8 <= row.count("█") < BAR_CELLS
    assert "…" not in console.export_text()


class Answers:
    """Stands for httpx.get: gives these answers in turn, statuses, the message of a 503, or a fleet."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, url, **_):
        answer = self.answers.pop(0)
        request = httpx.Request("GET", url)
        if isinstance(answer, int):
            return httpx.Response(answer, request=request)
        if isinstance(answer, str):
            return httpx.Response(503, json={"error": {"message": answer}}, request=request)
        return httpx.Response(200, json=answer, request=request)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (401, "TRIFLEET_KEY"),
        (403, "admin key"),
        ("The coordinator is away.", "does not show its state now: The coordinator is away."),
        ("No replica could answer.", "does not show its state now: No replica could answer."),
        (503, "does not show its state now: 503 Service Unavailable."),
        (404, "trifleet up"),
    ],
)
def test_why_there_is_no_picture_is_said_with_the_remedy(monkeypatch, answer, sentence):
    monkeypatch.setattr(httpx, "get", Answers(answer))
    with pytest.raises(FleetError, match=sentence):
        read_fleet("http://somewhere")


def test_a_watched_fleet_may_be_without_its_coordinator_for_a_while(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(httpx, "get", Answers("The coordinator is away.", fleet(7), 401))
    console, pictures = Console(width=120, record=True, file=io.StringIO()), []

    def update(drawn):
        console.print(drawn)
        pictures.append(drawn)
        if len(pictures) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch("http://somewhere", fleet(3), update)
    text = console.export_text()
    assert "The coordinator is away" in text
    assert "TRIFLEET_KEY" in text
    assert text.count("of 100") == 6


@pytest.mark.parametrize("key", ["schlüssel", "tf-key\r", "tf key"])
@pytest.mark.parametrize("command", [("status", "--once"), ("up",), ("demo",), ("bench", "start")])
def test_a_key_that_no_header_carries_is_refused_by_name_and_not_repeated(monkeypatch, tmp_path, command, key):
    monkeypatch.setenv("TRIFLEET_KEY", key)
    file = tmp_path / "fleet.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that no fleet starts, whatever becomes of the key
        file.write_text(f"served_model_name: m\nhttp: {{port: {taken.getsockname()[1]}}}\n")
        result = CliRunner().invoke(app, [*command, "-f", str(file)])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert "TRIFLEET_KEY holds white space or characters beyond ASCII" in " ".join(result.output.split())
    assert key.strip() not in result.output
