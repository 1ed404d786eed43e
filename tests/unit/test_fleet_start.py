"""How long `trifleet up` waits for a fleet, and what it says when it gives up. Serve is played; nothing starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from deploy import fleet
from deploy.app import APP, REPLICA
from deploy.settings import parse_settings


def serve_says(state: str, message: str) -> Any:
    deployment = SimpleNamespace(replica_states={"STARTING": 2}, message=message)
    application = SimpleNamespace(status=SimpleNamespace(value=state), deployments={REPLICA: deployment})
    return lambda: SimpleNamespace(applications={APP: application})


def complaint(monkeypatch: pytest.MonkeyPatch, state: str, message: str) -> str:
    monkeypatch.setattr(serve, "status", serve_says(state, message))
    node = SimpleNamespace(get_logs_dir_path=lambda: "/logs")
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    settings = parse_settings({"served_model_name": "m", "replicas": 2, "start_seconds": 0.1})
    with pytest.raises(fleet.FleetError) as caught:
        fleet._await_running(settings, lambda part: None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("message", "last"),
    [("", ""), ("More than 30 s\nto start.", ", and Serve says: to start.")],
    ids=["silent", "told"],
)
def test_a_fleet_that_takes_too_long_names_the_deadline_and_its_setting(
    monkeypatch: pytest.MonkeyPatch, message: str, last: str
) -> None:
    assert complaint(monkeypatch, "DEPLOYING", message) == (
        "The fleet did not start: 0 of 2 engines were up after start_seconds, 0.1 s: raise it where the model takes "
        f"longer to fetch and to load{last} (logs: /logs)"
    )


def test_a_fleet_that_fails_says_why_and_not_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said = complaint(monkeypatch, "DEPLOY_FAILED", "Traceback\nValueError: no such model")
    assert said == "The fleet did not start: ValueError: no such model (logs: /logs)"
