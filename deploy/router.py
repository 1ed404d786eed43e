"""The ingress request router: HAProxy asks it where each POST goes, and it asks the coordinator.

This file holds the one hook that is private to the pinned Ray (`_with_ingress_request_router`, the contract of
`/internal/route`, and a replica's HTTP endpoint); `tests/fleet/test_router_contract.py` checks it. The contract
is written in Ray's `ray/llm/_internal/serve/core/ingress/router.py`.

HAProxy turns any answer but 200 into a bare 503. So a refusal is routed as well, with a header that tells the
replica what to answer, and without a coordinator requests still flow, spread by Serve's power of two choices.
"""

import asyncio
import base64
import contextlib
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import ray
from ray import serve
from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle
from starlette import routing
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deploy import haproxy_servers, listed
from deploy.coordinator import NAME, NAMESPACE
from deploy.haproxy_wrapper import AGAIN_PREFIX, ASKED
from deploy.messages import Decision, DecisionPair, Demand, Refusal
from deploy.requests import Admissible, Served, examine
from deploy.tiers import Tier, with_default
from replicas.access import Access, Tenant
from replicas.endpoints import GENERATING, NOTHING_BOOKED, Endpoint
from replicas.headers import (
    KIND,
    LENGTH_CLASS,
    OUTPUT_LIMIT,
    REFUSAL,
    RESERVATION,
    TIER,
    WAITED,
    Answer,
    new_reservation,
)
from replicas.limits import RequestLimits
from replicas.link import Address, Link
from replicas.turnstile import Turnstile

logger = logging.getLogger("ray.serve")

# The coordinator answers at the queue's deadline; later than this it is taken for gone.
COORDINATOR_GRACE_SECONDS = 5.0
# And later than this after its arrival a request is refused, whatever it waits for: a router that HAProxy has given up
# on (`haproxy.ROUTER_GRACE_SECONDS`) is none, and the request would go unbooked onto a full fleet.
ANSWER_GRACE_SECONDS = 7.0
SHORT_BODY_BYTES = 2048
"""Of about a millisecond's work."""
BACKLOG_BYTES = 8 * 1024 * 1024
"""Of longer bodies whose tokens are not counted yet: some ten seconds of work. One tenant may have half of it, so that
its bodies alone do not refuse another's."""
BACKLOG_RETRY_SECONDS = 5
RESOLVE_ATTEMPTS = 4
RESOLVE_PAUSE_SECONDS = 0.5
WATCH_SECONDS = 0.25
PROBE_SECONDS = 2.0

_ERROR_TYPES = {
    400: "BadRequestError",
    429: "TooManyRequestsError",
    503: "ServiceUnavailableError",
}
_LATE = Answer(
    503,
    "ServiceUnavailableError",
    "The request found no place in time (queue_deadline_seconds): send it again later.",
    retry_after_seconds=1,
)
_BUSY = Answer(
    503,
    "ServiceUnavailableError",
    f"Long prompts wait to be counted, {BACKLOG_BYTES >> 20} MiB of them or half of that of this key: "
    "send the request again later.",
    retry_after_seconds=BACKLOG_RETRY_SECONDS,
)
_REASONS = {404: "unknown_model", 413: "body_too_large", 503: "router_busy"}
"""Labels of the rejections metric, for answers that come of a body."""


@serve.ingress()
class Router:
    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        engine_arguments: Mapping[str, Any],
        served: Served,
        queue_deadline_seconds: float,
        tiers: Mapping[str, Tier],
        access: Access,
        limits: RequestLimits,
    ) -> None:
        # Here, because transformers takes seconds to import and the driver needs only this class's name.
        from deploy.tokens import ModelTokens

        self._replicas = replicas
        self._served = served
        self._tiers = with_default(tiers)
        self._access = access
        self._limits = limits
        self._turnstile = Turnstile()
        self._patience = queue_deadline_seconds + COORDINATOR_GRACE_SECONDS
        self._answer_seconds = queue_deadline_seconds + ANSWER_GRACE_SECONDS
        # Tokenizers are not thread-safe: one for the event loop, and one for the thread that keeps long bodies off it.
        self._tokens, self._tokens_in_thread = ModelTokens(engine_arguments), ModelTokens(engine_arguments)
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens")
        self._backlog: Counter[str] = Counter()
        """Bytes by tenant."""
        # HAProxy asks the router of its own node where there is one.
        self._node = ray.get_runtime_context().get_node_id()
        # While Serve updates the router a node has two, and what the old one said must end with it.
        self._name = uuid.uuid4().hex
        self._link = Link(_find_coordinator)
        self._refused_alone: Counter[tuple[str, str]] = Counter()
        self._placed_alone: Counter[str] = Counter()
        self._background: set[asyncio.Task[Any]] = set()

    async def __serve_build_asgi_app__(self) -> routing.Router:
        async def route(request: Request) -> Response:
            answer = await self.route(request)
            # HAProxy makes its own 503 of it.
            return Response(status_code=503) if answer is None else JSONResponse(answer)

        self._in_background(self._watch())
        return routing.Router([routing.Route("/internal/route", route, methods=["POST"])])

    async def route(self, request: Request) -> dict[str, Any] | None:
        """HAProxy's question: the client's body, cut only where it is over the largest. The answer is `_route_to`'s, in
        time; None where no replica is there."""
        path, authorization = _asked(request)
        tenant = self._access.keyring.tenant(authorization)
        failed, waited = _came_back(request)
        try:
            async with asyncio.timeout(self._answer_seconds):
                return await self._routed(request, GENERATING.get(unquote(path)), tenant, failed, waited)
        except TimeoutError:
            self._release(failed)
            return self._refused(_LATE, tenant.tier, "queue_deadline" if self._listed() else "no_replica")

    async def _routed(
        self, request: Request, endpoint: Endpoint | None, tenant: Tenant, failed: str | None, waited: float
    ) -> dict[str, Any] | None:
        """`failed`: the reservation under which a replica has failed this request already; `waited`: seconds before."""
        arrived_at = time.monotonic() - waited
        if self._access.is_required and not tenant.is_known:
            # The replica refuses it, which knows the path as well: here it only books nothing.
            self._count_refusal(tenant.tier, "no_key")
            return self._to_anyone({})
        # The coordinator counts for all routers; what is too much for one alone is not even read.
        if failed is None and (
            busy := self._turnstile.begin(tenant.name, self._tiers[tenant.tier].allowance, arrived_at)
        ):
            return self._refused(busy, tenant.tier, "requests_per_minute")
        if endpoint is None:
            return _route_to(await self._any_replica(), {KIND: NOTHING_BOOKED})
        examined = await self._examined(await request.body(), endpoint, tenant)
        if isinstance(examined, Answer):
            self._release(failed)
            return self._refused(examined, tenant.tier, _REASONS.get(examined.status, "bad_request"))
        demand = replace(examined.demand, node=self._node, former=failed, waited_seconds=waited)
        examined = replace(examined, demand=demand)
        return await self._placed(examined, endpoint, failed, arrived_at)

    async def _examined(self, body: bytes, endpoint: Endpoint, tenant: Tenant) -> Admissible | Answer:
        tier = self._tiers[tenant.tier]
        given = (body, endpoint, new_reservation(), self._served)
        rules = (tenant, tier, self._limits)
        # A thread is for what would keep other requests waiting: to hand a short body over takes longer than to examine
        # it, and short ones do not wait behind long ones.
        if len(body) <= SHORT_BODY_BYTES:
            return examine(*given, self._tokens, *rules)
        mine = self._backlog[tenant.name] + len(body)
        if mine > BACKLOG_BYTES / 2 or self._backlog.total() + len(body) > BACKLOG_BYTES:
            return _BUSY
        self._backlog[tenant.name] = mine
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, examine, *given, self._tokens_in_thread, *rules)
        finally:
            self._backlog -= Counter({tenant.name: len(body)})  # drops what is 0

    async def _placed(
        self, request: Admissible, endpoint: Endpoint, failed: str | None, arrived_at: float
    ) -> dict[str, Any] | None:
        def headers(reservation: str, length_class: str | None = None) -> dict[str, str]:
            values = {
                RESERVATION: reservation,
                LENGTH_CLASS: length_class,
                TIER: request.demand.tier,
                WAITED: f"{time.monotonic() - arrived_at:.3f}",
                KIND: endpoint.kind,
                OUTPUT_LIMIT: None if request.output_limit is None else str(request.output_limit),
            }
            return {name: value for name, value in values.items() if value is not None}

        demand = request.demand
        # More than once, because the coordinator hears of a new replica before Serve lists it, and of a dead one
        # only by its silence.
        for _ in range(RESOLVE_ATTEMPTS):
            decision = await self._decide(demand, failed)
            if decision is None:
                break
            if isinstance(decision, Refusal):
                return self._to_anyone({REFUSAL: _answer(decision).encode()})
            if replica := self._listed().get(decision.replica):
                return _route_to(replica, headers(decision.reservation, decision.length_class))
            await self._ask(None, "release", decision.reservation)
            await asyncio.sleep(RESOLVE_PAUSE_SECONDS)
            waited = time.monotonic() - arrived_at
            former = decision.reservation
            demand = replace(demand, reservation=new_reservation(), former=former, waited_seconds=waited)
            failed = None
        replica = await self._any_replica()
        self._placed_alone[replica.replica_id.unique_id] += 1
        return _route_to(replica, headers(demand.reservation))

    async def _decide(self, demand: Demand, failed: str | None) -> Decision | None:
        """The coordinator's decision; None when there is no coordinator to ask."""
        try:
            pair: DecisionPair | None = await self._ask(DecisionPair, "acquire", demand, failed)
        except asyncio.CancelledError:
            # HAProxy waits for it no longer, so Serve cancels this task; in the coordinator it would wait on.
            self._release(demand.reservation)
            raise
        decision = None if pair is None else pair[0] or pair[1]
        if decision is not None and (self._refused_alone or self._placed_alone):
            self._tell_counts()
        return decision

    async def _watch(self) -> None:
        """Tell the coordinator which replicas requests get to, and ask those for a report that it has not heard of."""
        admin_socket = haproxy_servers.admin_socket(self._node)
        told: frozenset[str] | None = None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                of_serve = frozenset(replica.replica_id.to_full_id_str() for replica in self._listed().values())
                if not of_serve:
                    await self._any_replica()  # starts the handle's own watch
                    continue
                names = await haproxy_servers.reachable(admin_socket, of_serve)
                # None while HAProxy reads its first configuration: then it does not ask this router either.
                if names:
                    reachable = frozenset(ReplicaID.from_full_id_str(name).unique_id for name in names)
                    # None: as told before. Not to be relied on until the coordinator says that it knows.
                    news, told = None if reachable == told else reachable, None
                    silent = await self._ask(list[str] | None, "listed", self._name, news)
                    if silent is not None:
                        told = reachable
                    for replica in silent or ():
                        self._in_background(self._probe(replica))
            except OSError:
                continue  # HAProxy starts anew
            except Exception:
                # This loop has no caller, and must not end while the router serves.
                logger.exception("Looking after the replicas failed; trying again.")

    async def _probe(self, replica: str) -> None:
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            async with asyncio.timeout(PROBE_SECONDS):
                report = await self._replicas.probe.remote(replica)
            if report is not None:
                await self._ask(None, "report", report)

    def _release(self, reservation: str | None) -> None:
        """In the background; nothing happens to one that has ended."""
        if reservation:
            self._in_background(self._ask(None, "release", reservation))

    def _refused(self, answer: Answer, tier: str, reason: str) -> dict[str, Any] | None:
        self._count_refusal(tier, reason)
        return self._to_anyone({REFUSAL: answer.encode()})

    def _to_anyone(self, headers: dict[str, str]) -> dict[str, Any] | None:
        """Where a request goes that is refused; None where no replica is there that could say so: it waits for none."""
        there = list(self._listed().values())
        return _route_to(random.choice(there), headers) if there else None

    def _count_refusal(self, tier: str, reason: str) -> None:
        self._refused_alone[tier, reason] += 1
        self._tell_counts()

    def _tell_counts(self) -> None:
        """In the background, and again with the next ones if there is no coordinator now."""
        refused, placed = self._refused_alone, self._placed_alone
        self._refused_alone, self._placed_alone = Counter(), Counter()

        async def tell() -> None:
            if not await self._ask(bool, "count_router", refused, placed):
                self._refused_alone += refused
                self._placed_alone += placed

        self._in_background(tell())

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _listed(self) -> dict[str, RunningReplica]:
        """The replicas to which Serve sends now, by their unique ids; none before Serve has told the first time."""
        return listed.BY_DEPLOYMENT.get(self._replicas.deployment_name, {})

    async def _any_replica(self) -> RunningReplica:
        """Serve's own choice. Waits until there is one."""
        # _reserve=False: the request goes there through HAProxy, not through this handle.
        async with self._replicas.choose_replica(_reserve=False) as selection:
            replica: RunningReplica = selection._replica
            return replica

    async def _ask(self, kind: Any, method: str, *arguments: Any) -> Any:
        """Call the coordinator, whose answer is of that type; None when it is gone."""
        try:
            async with asyncio.timeout(self._patience):
                return await self._link.call(kind, method, *arguments)
        except (ray.exceptions.RayActorError, OSError, ValueError) as error:
            # ValueError: there is no actor of that name. OSError: of a timeout, too.
            logger.warning("The coordinator does not answer (%r): requests flow without it.", error)
            return None


async def _find_coordinator() -> Address:
    address: Address = await ray.get_actor(NAME, namespace=NAMESPACE).address.remote()
    return address


def _asked(request: Request) -> tuple[str, str]:
    """The path that the client asks for, and its Authorization as a replica will read it."""
    path, _, authorization = request.headers.get(ASKED, "").partition(" ")
    return path, base64.b64decode(authorization).decode("latin-1")


def _came_back(request: Request) -> tuple[str | None, float]:
    """Of a request that HAProxy sends again, because its replica failed before it answered: the reservation, and the
    seconds that it had waited for it here."""
    request_id = request.headers.get("x-request-id", "")
    if not request_id.startswith(AGAIN_PREFIX):
        return None, 0.0
    reservation, _, waited = request_id.removeprefix(AGAIN_PREFIX).partition(":")
    return reservation, float(waited or 0)


def _route_to(replica: RunningReplica, headers: dict[str, str]) -> dict[str, Any]:
    """The answer to HAProxy: where the request goes, and the headers that it gets on the way."""
    host, port = replica.backend_http_endpoint
    return {
        "host": host,
        "port": port,
        "replica_id": replica.replica_id.to_full_id_str(),
        "request_headers": headers,
    }


def _answer(refusal: Refusal) -> Answer:
    kind = _ERROR_TYPES[refusal.status]
    return Answer(refusal.status, kind, refusal.message, retry_after_seconds=refusal.retry_after_seconds)


def with_router(replicas: Application, router: Application) -> Application:
    """The application whose POST requests HAProxy sends where `router` says."""
    return replicas._with_ingress_request_router(router)
