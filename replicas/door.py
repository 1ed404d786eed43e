"""The outermost ASGI layer of a replica: who may come in, with how much, and for how long. The gate is behind it.

The router has judged most requests by the same rules before they get here. But HAProxy sends GETs past it, and
everything while no router answers, so nothing here trusts that. Serve gives every request an id, or keeps the client's,
and puts it on the answer; every refusal here is one line of the log with that id; neither keys nor bodies are logged.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replicas.access import Access, Tenant
from replicas.gate import REQUEST_ID, Reservations, after, answer_with, ended_by
from replicas.headers import REFUSAL, RESERVATION, Answer
from replicas.limits import RequestLimits, check_body, check_headers, check_size
from replicas.turnstile import Allowance, Turnstile

logger = logging.getLogger("ray.serve")

_NO_LIMITS = Allowance()
_PAGES = frozenset({"/fleet", "/metrics", "/metrics/engines"})
_POLICY_VIOLATION = 1008
# By then the application has ended by itself, or is cancelled.
_TO_LEAVE_SECONDS = 0.1


class Door:
    def __init__(
        self,
        gate: ASGIApp,
        access: Access,
        limits: RequestLimits,
        allowances: Mapping[str, Allowance],
        reservations: Reservations,
    ) -> None:
        """`allowances`: by tier; `reservations` hears of booked requests that are refused here."""
        self._gate = gate
        self._access = access
        self._limits = limits
        self._allowances = allowances
        self._reservations = reservations
        self._turnstile = Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})  # the fleet has no such endpoint
            return
        if scope["type"] != "http":
            await self._gate(scope, receive, send)
            return
        refused = check_headers(scope["headers"], self._limits)
        headers = MutableHeaders(scope=scope)
        reservation = headers.get(RESERVATION)
        request_id = headers.get(REQUEST_ID, "")
        # For the engine never the client's own: it could take the name of another's reservation.
        headers[REQUEST_ID] = reservation or f"req{uuid.uuid4().hex}"
        tenant = self._access.keyring.tenant(headers.get("authorization"))
        answering = _Answering(send)
        is_routed = reservation is not None or REFUSAL in headers
        refused = refused or self._refused(scope, headers, tenant, is_routed)
        if refused is None and not is_routed and scope["method"] not in ("GET", "HEAD"):
            body = await self._body(receive)
            if isinstance(body, Answer):
                refused = body
            else:
                receive = after({"type": "http.request", "body": body, "more_body": False}, receive)
        if refused is None:
            refused = self._turnstile.enter(tenant.name, self._allowance(tenant)) if _counts(scope) else None
            if refused is None:
                try:
                    await self._until_its_time_is_over(scope, receive, answering)
                finally:
                    if _counts(scope):
                        self._turnstile.leave(tenant.name)
                return
        if reservation is not None:
            self._reservations.begin(reservation, tenant.tier, "long", 0.0)
            self._reservations.finish(reservation)
        logger.warning("Refused %r of tenant %s: %d.", request_id[:128], tenant.name, refused.status)
        await self._answer(refused, scope)(scope, receive, answering.send)

    def _refused(self, scope: Scope, headers: MutableHeaders, tenant: Tenant, is_routed: bool) -> Answer | None:
        if refused := self._access.refusal(scope["path"], tenant):
            return refused
        if is_routed:  # the router has judged it; what it refused has its answer already
            return None
        length = headers.get("content-length", "0")
        if length.isdigit() and (refused := check_size(int(length[:18]), self._limits)):
            return refused
        if _counts(scope):
            return self._turnstile.begin(tenant.name, self._allowance(tenant), time.monotonic())
        return None

    def _allowance(self, tenant: Tenant) -> Allowance:
        return self._allowances.get(tenant.tier, _NO_LIMITS)

    async def _body(self, receive: Receive) -> bytes | Answer:
        """The whole body of a request that no router has read, or what is wrong with it."""
        body = b""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if refused := check_size(len(body), self._limits):
                        return refused
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = self._limits.body_seconds
            message_ = f"The request was not whole after {seconds:g} s (limits.body_seconds): send it faster."
            return Answer(408, "RequestTimeoutError", message_)
        try:
            values: Any = json.loads(body)
        except RecursionError:
            return Answer(400, "BadRequestError", "The request body is not usable JSON: it is nested too deeply.")
        except ValueError:
            return body  # vLLM says what is wrong with it
        return (check_body(values, self._limits) if isinstance(values, dict) else None) or body

    async def _until_its_time_is_over(self, scope: Scope, receive: Receive, answering: "_Answering") -> None:
        """When the time is over, the application is told that the client left, which ends the request in the engine."""
        over = answering.over
        timer = asyncio.get_running_loop().call_later(self._limits.request_seconds, over.set)
        try:
            async with asyncio.timeout(self._limits.request_seconds + _TO_LEAVE_SECONDS):
                await self._gate(scope, ended_by(over, receive), answering.send)
        except Exception:
            # Whatever an application makes of being told that the client left is no error of this request.
            if not over.is_set():
                raise
        finally:
            timer.cancel()
        if over.is_set() and not answering.has_begun:
            message = f"The request took longer than {self._limits.request_seconds:g} s (limits.request_seconds)."
            answering.over = asyncio.Event()
            await answer_with(Answer(408, "RequestTimeoutError", message))(scope, receive, answering.send)

    @staticmethod
    def _answer(refused: Answer, scope: Scope) -> Response:
        response = answer_with(refused)
        if refused.status == 401:
            # Basic on the pages, so that a browser asks for the key.
            is_page = scope["path"] in _PAGES
            response.headers["www-authenticate"] = 'Basic realm="trifleet"' if is_page else "Bearer"
        return response


class _Answering:
    """The way of an answer to the client, not beyond its time."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.over = asyncio.Event()
        self.has_begun = False

    async def send(self, message: Message) -> None:
        if self.over.is_set():
            return
        if message["type"] == "http.response.start":
            self.has_begun = True
        await self._send(message)


def _counts(scope: Scope) -> bool:
    """Whether the request is one of those that a tier's limits are about."""
    return scope["method"] == "POST"
