"""The way of an answer from vLLM's application to HAProxy, and the three things that are changed on it.

- Nothing leaves before the first byte of the body. Until then HAProxy can send the request to another replica, and it
  does when this one dies or says 502, which is said here when the engine is dead and nothing was answered yet.
- After that, a failure looks like one: what follows an error event of a stream is cut off, `[DONE]` included.
- `usage` says what the request took: `"trifleet": {"tier": "gold", "kv_block_seconds": 12.345}`.
"""

import json
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Message, Send

from replicas.headers import Answer

# HAProxy sends the request to another replica on this status (`deploy/haproxy.py`). vLLM never answers it.
FAILED_STATUS = 502
_FAILED = Answer(FAILED_STATUS, "ServiceUnavailableError", "The replica's engine failed: send the request again.")
_ERROR_EVENT = b'data: {"error"'
_USAGE = b'"usage":{'
_LAST_EVENT = b'"choices":[]'


class Account(Protocol):
    def answered(self, reservation: str) -> None: ...

    def usage(self, reservation: str) -> tuple[str, float]: ...


class AnswerPath:
    """`send` takes ASGI's messages of one response in their order."""

    def __init__(self, send: Send, is_dead: Callable[[], bool], account: Account, reservation: str) -> None:
        self._send = send
        self._is_dead = is_dead
        self._account = account
        self._reservation = reservation
        self._start: Message | None = None
        self._is_cut = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif not self._is_cut:
            await self._send_body(message)

    async def _send_body(self, message: Message) -> None:
        body = message.get("body", b"")
        if self._start is not None:
            if self._is_dead():
                await self._send_failed()
                return
            body = self._with_usage(body, is_whole=not message.get("more_body", False))
            self._account.answered(self._reservation)
            start, self._start = self._start, None
            await self._send(start if message.get("more_body", False) else _with_length(start, body))
        elif _USAGE in body and _LAST_EVENT in body:
            body = b"\n\n".join(self._event_with_usage(event) for event in body.split(b"\n\n"))
        await self._send({**message, "body": body})
        # Without its last message the transfer is broken, and the server closes the connection.
        self._is_cut = body.startswith(_ERROR_EVENT)

    async def _send_failed(self) -> None:
        body = json.dumps(_FAILED.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        self._start, self._is_cut = None, True
        await self._send({"type": "http.response.start", "status": FAILED_STATUS, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _with_usage(self, body: bytes, is_whole: bool) -> bytes:
        """A JSON answer that came in one piece; anything else as it is."""
        if not is_whole or not body.startswith(b"{") or _USAGE not in body:
            return body
        answer = json.loads(body)
        return _dumped(self._extended(answer)) if isinstance(answer.get("usage"), dict) else body

    def _event_with_usage(self, event: bytes) -> bytes:
        """A stream's last event, which carries the usage of the whole answer and no choices."""
        prefix = b"data: "
        if not event.startswith(prefix) or _LAST_EVENT not in event:
            return event
        return prefix + _dumped(self._extended(json.loads(event[len(prefix) :])))

    def _extended(self, answer: dict[str, Any]) -> dict[str, Any]:
        tier, block_seconds = self._account.usage(self._reservation)
        extension = {"tier": tier, "kv_block_seconds": round(block_seconds, 3)}
        return {**answer, "usage": {**answer["usage"], "trifleet": extension}}


def _dumped(answer: dict[str, Any]) -> bytes:
    """As vLLM writes its own. Raw text may hold lone surrogates, which UTF-8 has no bytes for; JSON escapes them."""
    return json.dumps(answer, separators=(",", ":")).encode()


def _with_length(start: Message, body: bytes) -> Message:
    headers = [
        (name, str(len(body)).encode() if name.lower() == b"content-length" else value)
        for name, value in start["headers"]
    ]
    return {**start, "headers": headers}
