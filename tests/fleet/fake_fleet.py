"""`trifleet up` with fake engines: `python -m tests.fleet.fake_fleet SETTINGS`."""

import sys
from pathlib import Path

import deploy.fleet
from deploy.cli import up
from deploy.fleet import Progress
from deploy.settings import FleetSettings

_start_serve = deploy.fleet._start_serve


def _start_with_fakes(settings: FleetSettings, progress: Progress) -> None:
    # Here, because Ray Serve reads the fleet's environment when it is imported.
    import deploy.app
    from tests.fleet.fake_replica import FakeEngineReplica

    deploy.app.Replica = FakeEngineReplica  # type: ignore[misc]
    _start_serve(settings, progress)


if __name__ == "__main__":
    deploy.fleet._start_serve = _start_with_fakes
    up(Path(sys.argv[1]))
