"""What the router does about time: it answers HAProxy before that gives up on it. No Ray, no coordinator."""

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.requests import Request

import bundled
import deploy.reachable
import deploy.router
from deploy import listed
from deploy.haproxy_wrapper import AGAIN_PREFIX, ASKED
from deploy.messages import Placement, Refusal
from deploy.reachable import Reachable
from deploy.requests import Served
from replicas.access import Access, Keyring, Tenant
from replicas.headers import REFUSAL, RESERVATION, WAITED, Answer
from replicas.limits import RequestLimits

REPLICA = SimpleNamespace(
    backend_http_endpoint=("127.0.0.1", 1), replica_id=SimpleNamespace(unique_id="a", to_full_id_str=lambda: "app#a")
)
MODEL_ARGUMENTS = {"model": str(bundled.MODEL)}


class Coordinator:
    """Stands for the link to it: gives these decisions in turn and then none; remembers what was released. It refuses
    in place of a replica None."""

    def __init__(self, *replicas):
        self.replicas = list(replicas)
        self.asked, self.released, self.refused = 0, [], []
        self.demand = None
        """The last one."""

    async def call(self, kind, method, *arguments):
        if method == "release":
            self.released.append(arguments[0])
        elif method == "count_router":
            self.refused += arguments[0]
            return True
        elif method == "acquire":
            self.asked += 1
            self.demand = arguments[0]
            if not self.replicas:
                await asyncio.Event().wait()
            reservation, replica = arguments[0].reservation, self.replicas.pop(0)
            if replica is None:
                return None, Refusal(reservation, 503, "no_replica", "No replica has reported.", 5)
            return Placement(reservation, replica, "most_headroom", "short"), None


NO_KEYS = Keyring({})
KEYS = Keyring({hashlib.sha256(key.encode()).digest(): Tenant(key, "default") for key in "abc"})


@pytest.fixture
def serve(monkeypatch):
    """Stands for Ray: one replica, which is listed."""
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(deploy.router.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(deploy.router, "COORDINATOR_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(deploy.router, "ANSWER_GRACE_SECONDS", 0.3)
    monkeypatch.setitem(listed.BY_DEPLOYMENT, "replica", {"a": REPLICA})


def router(coordinator, queue_deadline_seconds=0.3, keyring=NO_KEYS, is_key_needed=False):
    @contextlib.asynccontextmanager
    async def choose_replica(_reserve):
        if not listed.BY_DEPLOYMENT["replica"]:
            await asyncio.Event().wait()
        yield SimpleNamespace(_replica=REPLICA)

    handle = SimpleNamespace(deployment_name="replica", choose_replica=choose_replica)
    # What `serve.ingress` makes of the class needs a replica of Serve's around it.
    plain = next(
        cls for cls in deploy.router.Router.__mro__ if cls.__module__ == "deploy.router" and "route" in vars(cls)
    )
    made = plain(
        handle,
        MODEL_ARGUMENTS,
        Served("m", 4096),
        queue_deadline_seconds,
        {},
        Access(keyring, is_key_needed),
        RequestLimits(),
    )
    made._link = coordinator
    return made


def question(characters=10, key="", failed=None, waited=0.0, path="/v1/completions", **fields):
    body = json.dumps({"prompt": "x" * characters, "max_tokens": 1, **fields}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    asked = f"{path} {base64.b64encode(f'Bearer {key}'.encode()).decode()}"
    headers = [(ASKED.encode(), asked.encode())]
    if failed is not None:
        headers.append((b"x-request-id", f"{AGAIN_PREFIX}{failed}:{waited:.3f}".encode()))
    return Request({"type": "http", "method": "POST", "path": "/internal/route", "headers": headers}, receive)


def refusal(answer):
    return Answer.decode(answer["request_headers"][REFUSAL])


async def test_a_request_in_time_goes_where_the_coordinator_says(serve):
    answer = await router(Coordinator("a")).route(question())
    assert answer["replica_id"] == "app#a"
    assert answer["request_headers"][RESERVATION].startswith("rsv")


async def test_all_attempts_to_place_a_request_have_one_deadline_from_its_arrival(serve):
    """The replica of the first decisions is not listed yet, and then the request waits in the queue anew."""
    coordinator, began = Coordinator("new"), time.monotonic()
    answer = await router(coordinator).route(question())
    assert time.monotonic() - began < 1
    assert coordinator.asked == 2
    late = refusal(answer)
    assert (late.status, late.retry_after_seconds) == (503, 1)
    await asyncio.sleep(0.01)
    assert len(set(coordinator.released)) == 2
    assert coordinator.refused == [("default", "queue_deadline")]


async def test_without_any_replica_haproxy_is_told_so_in_time(serve, monkeypatch):
    monkeypatch.setitem(listed.BY_DEPLOYMENT, "replica", {})
    coordinator = Coordinator("a")
    assert await router(coordinator).route(question()) is None
    await asyncio.sleep(0.01)
    assert coordinator.refused == [("default", "no_replica")]


@pytest.mark.parametrize(
    ("asks", "is_key_needed", "counted"),
    [({}, False, []), ({"n": -1}, False, ["bad_request"]), ({}, True, ["no_key"])],
)
async def test_a_refusal_that_no_replica_is_there_to_answer_is_counted_once_and_waits_for_none(
    serve, monkeypatch, asks, is_key_needed, counted
):
    """The coordinator has counted its own."""
    monkeypatch.setitem(listed.BY_DEPLOYMENT, "replica", {})
    coordinator = Coordinator(None)
    asked = router(coordinator, queue_deadline_seconds=60, is_key_needed=is_key_needed)
    assert await asyncio.wait_for(asked.route(question(**asks)), 5) is None
    await asyncio.sleep(0.01)
    assert coordinator.refused == [("default", reason) for reason in counted]


async def test_a_coordinator_that_does_not_answer_is_gone_before_a_request_is_late(serve, monkeypatch):
    monkeypatch.setattr(deploy.router, "ANSWER_GRACE_SECONDS", 5)
    answer = await router(Coordinator()).route(question())
    assert RESERVATION in answer["request_headers"]


@pytest.fixture
def slowly(monkeypatch):
    """Long prompts are not counted until this is set; 10,000 bytes of them may wait."""
    monkeypatch.setattr(deploy.router, "BACKLOG_BYTES", 10_000)
    counted, examine = threading.Event(), deploy.router.examine

    def waits(body, *rest):
        if len(body) > deploy.router.SHORT_BODY_BYTES:
            counted.wait(10)
        return examine(body, *rest)

    monkeypatch.setattr(deploy.router, "examine", waits)
    yield counted
    counted.set()


async def held_back(asked, keys):
    """A long prompt of each key, which waits to be counted."""
    waiting = [asyncio.create_task(asked.route(question(2400, key))) for key in keys]
    await asyncio.sleep(0.01)
    return waiting


async def test_long_prompts_wait_up_to_a_bound_and_short_ones_do_not_wait_for_them(serve, slowly):
    coordinator = Coordinator(*"aaaaa")
    asked = router(coordinator, queue_deadline_seconds=60, keyring=KEYS)
    waiting = await held_back(asked, "aabb")
    busy = refusal(await asked.route(question(2400, "c")))
    assert (busy.status, busy.retry_after_seconds) == (503, deploy.router.BACKLOG_RETRY_SECONDS)
    assert RESERVATION in (await asked.route(question()))["request_headers"]
    slowly.set()
    assert all(RESERVATION in answer["request_headers"] for answer in await asyncio.gather(*waiting))
    assert not asked._backlog
    assert coordinator.refused == [("default", "router_busy")]


async def test_long_prompts_of_one_key_leave_half_of_the_bound_to_others(serve, slowly):
    asked = router(Coordinator(*"aaa"), queue_deadline_seconds=60, keyring=KEYS)
    waiting = await held_back(asked, "aa")
    assert refusal(await asked.route(question(2400, "a"))).status == 503
    waiting += await held_back(asked, "b")
    slowly.set()
    assert all(RESERVATION in answer["request_headers"] for answer in await asyncio.gather(*waiting))


@pytest.mark.parametrize("others", ["aa", ""])
async def test_a_retry_that_the_router_refuses_ends_what_its_replica_failed(serve, slowly, others):
    """At once, or as it is late."""
    coordinator = Coordinator()
    asked = router(coordinator, keyring=KEYS)
    await held_back(asked, others)
    assert refusal(await asked.route(question(2400, "a", failed="rsv0"))).status == 503
    await asyncio.sleep(0.01)
    assert coordinator.released == ["rsv0"]


async def test_what_a_request_waited_before_its_replica_failed_counts_towards_its_deadline(serve):
    coordinator = Coordinator("a")
    answer = await router(coordinator).route(question(failed="rsv0", waited=7.5))
    assert (coordinator.demand.former, coordinator.demand.waited_seconds) == ("rsv0", 7.5)
    assert float(answer["request_headers"][WAITED]) >= 7.5


async def test_what_a_router_said_counts_no_longer_when_it_has_ended_though_its_node_has_another(serve, monkeypatch):
    """Serve replaces a router while it updates. The old one told last, and too few replicas."""
    monkeypatch.setattr(deploy.router, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(deploy.reachable, "ROUTER_GONE_SECONDS", 0.2)
    known = {"new": {"SERVE_REPLICA::app#d#a", "SERVE_REPLICA::app#d#b"}, "old": {"SERVE_REPLICA::app#d#a"}}

    async def told_by_haproxy(_socket, _of_serve):
        return known[asyncio.current_task().get_name()]

    monkeypatch.setattr(deploy.router.haproxy_servers, "reachable", told_by_haproxy)
    heard = Reachable()

    class Hears:
        async def call(self, _kind, _method, name, replicas):
            return [] if heard.hear(name, replicas, time.monotonic()) else None

    new = asyncio.create_task(router(Hears())._watch(), name="new")
    await asyncio.sleep(0.1)
    assert heard.by_all == {"a", "b"}
    old = asyncio.create_task(router(Hears())._watch(), name="old")
    await asyncio.sleep(0.1)
    assert heard.by_all == {"a"}
    old.cancel()
    await asyncio.sleep(0.4)
    assert heard.by_all == {"a", "b"}
    new.cancel()
