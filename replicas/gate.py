"""The ASGI layer between HAProxy and vLLM's application: carries out what the router decided.

A refused request is answered here and never reaches the engine. An admitted one carries its reservation into
vLLM as the request id, and its end, in whatever way, is told to the reporter. What is changed of the answer itself is
`answer.py`'s. The fleet's own pages are answered here too, because replicas are the fleet's only HTTP servers.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replicas.answer import AnswerPath
from replicas.endpoints import FREE, GENERATING, kind_of
from replicas.headers import KIND, LENGTH_CLASS, OUTPUT_LIMIT, REFUSAL, RESERVATION, TIER, WAITED, Answer

REQUEST_ID = "x-request-id"
DISCONNECT_SECONDS = 5.0
# Of requests that the router did not see.
NO_TIER = "default"
NO_CLASS = "long"


@dataclass(frozen=True)
class Page:
    media_type: str
    render: Callable[[], Awaitable[bytes]]
    html: Callable[[], bytes] | None = None
    """What a browser gets instead, one self-contained document; it asks for the other form itself."""


# The document may run what it brings along and ask the fleet, and nothing else.
_HTML_HEADERS = {
    "vary": "Accept",
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Reservations(Protocol):
    """Who is told when a request of a reservation comes, is answered and has ended, and knows what it took."""

    def begin(self, reservation: str, tier: str, length_class: str, waited_seconds: float) -> None: ...

    def answered(self, reservation: str) -> None: ...

    def usage(self, reservation: str) -> tuple[str, float]: ...

    def finish(self, reservation: str) -> None: ...


class Gate:
    """`is_dead` says whether the engine is: what it has not begun to answer then goes to another replica."""

    def __init__(
        self,
        app: ASGIApp,
        reservations: Reservations,
        pages: Mapping[str, Page],
        is_dead: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._reservations = reservations
        self._pages = pages
        self._is_dead = is_dead

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "GET" and (page := self._pages.get(scope["path"])):
            await (await _render(page, MutableHeaders(scope=scope)))(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        reservation = headers.get(RESERVATION)
        if reservation is None:
            await self._admitted(scope, receive, send, None)
            return
        tier, length_class = headers.get(TIER, NO_TIER), headers.get(LENGTH_CLASS, NO_CLASS)
        self._reservations.begin(reservation, tier, length_class, float(headers.get(WAITED, "0")))
        try:
            await self._admitted(scope, receive, send, reservation)
        finally:
            self._reservations.finish(reservation)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send, reservation: str | None) -> None:
        headers = MutableHeaders(scope=scope)
        if answer := _refusal(scope, headers):
            await answer_with(answer)(scope, receive, send)
            return
        if fields := _own_fields(scope, headers):
            receive = await _with_fields(fields, headers, receive)
        if reservation is None:
            await self._to_its_end(scope, receive, send)
            return
        path = AnswerPath(send, self._is_dead, self._reservations, reservation)
        await self._to_its_end(scope, receive, path.send)

    async def _to_its_end(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Await vLLM's application, and where Serve cancels the request, let it end by itself first.

        Serve cancels a request whose client left, or whose time is over. vLLM's handlers that do not stream leave their
        work running when they are cancelled (`with_cancellation`), but abort it in the engine when they receive
        `http.disconnect`. Of a time that is over Serve says nothing there, so it is said here.
        """
        cancelled = asyncio.Event()
        task = asyncio.ensure_future(self._app(scope, ended_by(cancelled, receive), send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled.set()
            # What the application makes of it is no error: nobody is there to be answered.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            await asyncio.wait([task], timeout=DISCONNECT_SECONDS)
            task.cancel()
            raise


def _own_fields(scope: Scope, headers: MutableHeaders) -> dict[str, Any]:
    """What the fleet puts into the body, over what the client has there: its tier's limit, where it is the lower one,
    and the request's id where vLLM takes it from the body."""
    endpoint = GENERATING.get(scope["path"])
    if endpoint is None or scope["method"] != "POST":
        return {}
    fields: dict[str, Any] = {}
    if limit := headers.get(OUTPUT_LIMIT):
        fields[endpoint.output_limits[0]] = int(limit)
    if endpoint.id_in_body is not None:
        name, beginning = endpoint.id_in_body
        fields[name] = beginning + headers[REQUEST_ID]
    return fields


async def _with_fields(fields: dict[str, Any], headers: MutableHeaders, receive: Receive) -> Receive:
    """The same request with other values of these fields; what is no JSON object stays as it is."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return after(message, receive)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(body)
        if isinstance(values, dict):
            body = json.dumps({**values, **fields}).encode()
            headers["content-length"] = str(len(body))
    return after({"type": "http.request", "body": body, "more_body": False}, receive)


def after(message: Message, receive: Receive) -> Receive:
    """What gives `message` first, and then what `receive` gives."""
    first: Message | None = message

    async def receive_next() -> Message:
        nonlocal first
        if first is not None:
            taken, first = first, None
            return taken
        return await receive()

    return receive_next


def ended_by(over: asyncio.Event, receive: Receive) -> Receive:
    """What `receive` gives, and once `over` is set that the client has left."""

    async def until_over() -> Message:
        if over.is_set():
            return {"type": "http.disconnect"}
        coming, ending = asyncio.ensure_future(receive()), asyncio.ensure_future(over.wait())
        try:
            await asyncio.wait((coming, ending), return_when=asyncio.FIRST_COMPLETED)
            return coming.result() if coming.done() else {"type": "http.disconnect"}
        finally:
            ending.cancel()
            if not coming.done():
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await coming

    return until_over


def _refusal(scope: Scope, headers: MutableHeaders) -> Answer | None:
    """What to answer instead of the engine, if anything."""
    if encoded := headers.get(REFUSAL):
        return Answer.decode(encoded)
    path = scope["path"]
    if scope["method"] == "POST" and path not in GENERATING and path not in FREE:
        return Answer(404, "NotFoundError", f"There is no POST {path[:100]} here: use one of {', '.join(GENERATING)}.")
    if headers.get(KIND, kind_of(path)) != kind_of(path):
        # What was booked and checked is another endpoint's.
        return Answer(400, "BadRequestError", f"The router has not read the path as {path[:100]}: send it as it is.")
    return None


def answer_with(answer: Answer) -> Response:
    headers = {}
    if answer.retry_after_seconds is not None:
        headers["retry-after"] = str(answer.retry_after_seconds)
    # ASCII, because a message may quote what UTF-8 cannot hold (a lone surrogate in a JSON string).
    return Response(json.dumps(answer.body()), answer.status, headers, media_type="application/json")


async def _render(page: Page, headers: MutableHeaders) -> Response:
    if page.html is not None and "text/html" in headers.get("accept", ""):
        return Response(page.html(), headers=_HTML_HEADERS, media_type="text/html")
    try:
        return Response(await page.render(), headers={"vary": "Accept"}, media_type=page.media_type)
    except Exception:
        # Whatever keeps the coordinator or another replica from answering, a scrape gets a sentence and not a trace.
        answer = Answer(503, "service_unavailable", "The coordinator does not answer now: ask again in a second.")
        return answer_with(answer)
