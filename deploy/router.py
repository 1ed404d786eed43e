"""The ingress request router: HAProxy asks it where each POST goes, and it asks the coordinator.

This file holds the one hook that is private to the pinned Ray (`_with_ingress_request_router`, the contract of
`/internal/route`, and a replica's HTTP endpoint); `tests/fleet/test_router_contract.py` checks it. The contract
is written in Ray's `ray/llm/_internal/serve/core/ingress/router.py`.

HAProxy turns any answer but 200 into a bare 503. So a refusal is routed as well, with a header that tells the
replica what to answer, and without a coordinator requests still flow, spread by Serve's power of two choices.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI, Request
from ray import serve
from ray.actor import ActorHandle
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

from deploy.coordinator import NAME, NAMESPACE
from deploy.messages import Decision, Demand, Placement, Refusal
from deploy.requests import Admissible, Served, examine, too_large
from deploy.tokens import ModelTokens
from replicas.headers import KIND, REFUSAL, RESERVATION, Answer, new_reservation

logger = logging.getLogger(__name__)

# The coordinator answers at the queue's deadline; later than this it is taken for gone.
COORDINATOR_GRACE_SECONDS = 5.0
# HAProxy's patience with the router, beyond the queue's deadline.
ROUTER_GRACE_SECONDS = 10
RESOLVE_ATTEMPTS = 4
RESOLVE_PAUSE_SECONDS = 0.5

_ERROR_TYPES = {
    400: "BadRequestError",
    429: "TooManyRequestsError",
    503: "ServiceUnavailableError",
}

api = FastAPI()


class AssignedReplicaRouter(PowerOfTwoChoicesRequestRouter):
    """Resolves the replica that the coordinator assigned: the first routing argument, a replica's unique id.

    Without one, or when Serve does not know that replica (any more), it is the power of two choices.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is not None and pending_request.args:
            assigned = pending_request.args[0]
            for replica in candidate_replicas:
                if replica.replica_id.unique_id == assigned:
                    return [[replica]]
        return await super().choose_replicas(candidate_replicas, pending_request)


@serve.ingress(api)
class Router:
    def __init__(
        self, replicas: DeploymentHandle[Any], model: str, served: Served, queue_deadline_seconds: float
    ) -> None:
        self._replicas = replicas
        self._served = served
        self._patience = queue_deadline_seconds + COORDINATOR_GRACE_SECONDS
        self._tokens = ModelTokens(model)
        # One thread: tokenizing stays off the event loop, and the tokenizer is not thread-safe.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens")
        self._coordinator: ActorHandle[Any] | None = None
        self._background: set[asyncio.Task[None]] = set()

    @api.post("/internal/route")
    async def route(self, request: Request) -> dict[str, Any]:
        if advertised := request.headers.get("x-body-truncated"):
            return await self._refused(too_large(advertised), "body_too_large")
        body = await request.body()
        examined = await asyncio.get_running_loop().run_in_executor(
            self._threads, examine, body, new_reservation(), self._served, self._tokens
        )
        if isinstance(examined, Answer):
            return await self._refused(examined, "bad_request")
        return await self._placed(examined)

    async def _placed(self, request: Admissible) -> dict[str, Any]:
        headers = {} if request.kind is None else {KIND: request.kind}
        # More than once, because the coordinator hears of a new replica before Serve lists it, and of a dead one
        # only by its silence.
        for _ in range(RESOLVE_ATTEMPTS):
            decision = await self._decide(request.demand)
            if decision is None:
                return await self._target(None, headers)
            if isinstance(decision, Refusal):
                return await self._target(None, {REFUSAL: _answer(decision).encode()})
            target = await self._target(decision.replica, {**headers, RESERVATION: decision.reservation})
            if target["assigned"]:
                return target
            await self._tell("release", decision.reservation)
            await asyncio.sleep(RESOLVE_PAUSE_SECONDS)
            request = replace(request, demand=replace(request.demand, reservation=new_reservation()))
        return await self._target(None, headers)

    async def _decide(self, demand: Demand) -> Decision | None:
        """The coordinator's decision; None when there is no coordinator to ask."""
        try:
            decision: Placement | Refusal = await asyncio.wait_for(
                self._resolve().acquire.remote(demand), self._patience
            )
        except (ray.exceptions.RayActorError, TimeoutError, ValueError) as error:
            logger.warning("The coordinator does not answer (%s): placing without it.", error)
            self._coordinator = None
            return None
        return decision

    async def _refused(self, answer: Answer, reason: str) -> dict[str, Any]:
        return await self._target(None, {REFUSAL: answer.encode()})

    async def _tell(self, method: str, *arguments: Any) -> None:
        try:
            await getattr(self._resolve(), method).remote(*arguments)
        except (ray.exceptions.RayActorError, ValueError):
            self._coordinator = None

    async def _target(self, assigned: str | None, headers: dict[str, str]) -> dict[str, Any]:
        """The answer to HAProxy: an assigned replica, or any."""
        arguments = () if assigned is None else (assigned,)
        # _reserve=False: the request goes there through HAProxy, not through this handle.
        async with self._replicas.choose_replica(*arguments, _reserve=False) as selection:
            replica = selection._replica
            host, port = replica.backend_http_endpoint
            return {
                "host": host,
                "port": port,
                "replica_id": replica.replica_id.to_full_id_str(),
                "request_headers": headers,
                "assigned": replica.replica_id.unique_id == assigned,
            }

    def _resolve(self) -> "ActorHandle[Any]":
        """Raises ValueError when there is no such actor."""
        if self._coordinator is None:
            self._coordinator = ray.get_actor(NAME, namespace=NAMESPACE)
        return self._coordinator


def _answer(refusal: Refusal) -> Answer:
    kind = _ERROR_TYPES[refusal.status]
    return Answer(refusal.status, kind, refusal.message, retry_after_seconds=refusal.retry_after_seconds)


def with_router(replicas: Application, router: Application) -> Application:
    """The application whose POST requests HAProxy sends where `router` says."""
    return replicas._with_ingress_request_router(router)
