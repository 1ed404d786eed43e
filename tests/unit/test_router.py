"""What the router does about time: it answers HAProxy before that gives up on it. No Ray, no coordinator."""

import asyncio
import contextlib
import json
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.requests import Request

import bundled
import deploy.router
from deploy import listed
from deploy.haproxy_wrapper import ASKED
from deploy.messages import Placement
from deploy.requests import Served
from replicas.access import Access, Keyring
from replicas.headers import REFUSAL, RESERVATION, Answer
from replicas.limits import RequestLimits

REPLICA = SimpleNamespace(
    backend_http_endpoint=("127.0.0.1", 1), replica_id=SimpleNamespace(unique_id="a", to_full_id_str=lambda: "app#a")
)
MODEL_ARGUMENTS = {"model": str(bundled.MODEL)}


class Coordinator:
    """Stands for the link to it: gives these decisions in turn and then none; remembers what was released."""

    def __init__(self, *replicas):
        self.replicas = list(replicas)
        self.asked, self.released, self.refused = 0, [], []

    async def call(self, kind, method, *arguments):
        if method == "release":
            self.released.append(arguments[0])
        elif method == "count_router":
            self.refused += arguments[0]
            return True
        elif method == "acquire":
            self.asked += 1
            if not self.replicas:
                await asyncio.Event().wait()
            return Placement(arguments[0].reservation, self.replicas.pop(0), "most_headroom", "short"), None


@pytest.fixture
def serve(monkeypatch):
    """Stands for Ray: one replica, which is listed."""
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(deploy.router.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(deploy.router, "COORDINATOR_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(deploy.router, "ANSWER_GRACE_SECONDS", 0.3)
    monkeypatch.setitem(listed.BY_DEPLOYMENT, "replica", {"a": REPLICA})


def router(coordinator, queue_deadline_seconds=0.3):
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
        Access(Keyring({}), False),
        RequestLimits(),
    )
    made._link = coordinator
    return made


def question(characters=10):
    body = json.dumps({"prompt": "x" * characters, "max_tokens": 1}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(ASKED.encode(), b"/v1/completions ")]
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
    assert await router(Coordinator("a")).route(question()) is None


async def test_a_coordinator_that_does_not_answer_is_gone_before_a_request_is_late(serve, monkeypatch):
    monkeypatch.setattr(deploy.router, "ANSWER_GRACE_SECONDS", 5)
    answer = await router(Coordinator()).route(question())
    assert RESERVATION in answer["request_headers"]


async def test_long_prompts_wait_up_to_a_bound_and_short_ones_do_not_wait_for_them(serve, monkeypatch):
    monkeypatch.setattr(deploy.router, "BACKLOG_BYTES", 10_000)
    counted, examine = threading.Event(), deploy.router.examine

    def slowly(body, *rest):
        if len(body) > deploy.router.SHORT_BODY_BYTES:
            counted.wait(10)
        return examine(body, *rest)

    monkeypatch.setattr(deploy.router, "examine", slowly)
    coordinator = Coordinator(*"aaaa")
    asked = router(coordinator, queue_deadline_seconds=60)
    waiting = [asyncio.create_task(asked.route(question(3000))) for _ in range(3)]
    await asyncio.sleep(0.01)
    busy = refusal(await asked.route(question(3000)))
    assert (busy.status, busy.retry_after_seconds) == (503, deploy.router.BACKLOG_RETRY_SECONDS)
    assert RESERVATION in (await asked.route(question()))["request_headers"]
    counted.set()
    assert all(RESERVATION in answer["request_headers"] for answer in await asyncio.gather(*waiting))
    assert asked._backlog_bytes == 0
    assert coordinator.refused == [("default", "queue_full")]
