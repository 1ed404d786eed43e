"""A real Prometheus that has watched the fake fleet, started once for all tests that ask it something."""

import time

import pytest

from tests.observability.debian import ProgramMissing, tool
from tests.observability.fake_fleet import fake_fleet_server
from tests.observability.prometheus import running_prometheus

WATCH_SECONDS = 12


@pytest.fixture(scope="session")
def promtool():
    return _installed("promtool", "prometheus")


@pytest.fixture(scope="session")
def watched():
    """Prometheus, and the beginning and end of what it saw (Unix time)."""
    _installed("prometheus", "prometheus")
    with fake_fleet_server() as url, running_prometheus(url) as prometheus:
        began = time.time()
        time.sleep(WATCH_SECONDS)
        yield prometheus, began, time.time()


def _installed(name, package):
    try:
        return tool(name, package)
    except ProgramMissing as missing:
        pytest.skip(str(missing))
