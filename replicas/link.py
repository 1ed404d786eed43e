"""The way to the coordinator: msgpack over one TCP connection for each process that asks.

Every request and every capacity report goes through the coordinator, and a call of a Ray actor takes half a
millisecond of Python at each end. Ray still starts the coordinator and finds it: whoever may call it by Ray learns
where it listens, and the token without which it hears nobody. The other end is `deploy/listener.py`.

    -> token, once
    -> length (4 bytes) | [7, "acquire", [demand, null]]
    <- length (4 bytes) | [7, decision, null]                or [7, null, "what went wrong"]
"""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
from pydantic import BaseModel

# Whose machine is lost says nothing any more: after so long it counts as gone.
SILENT_SECONDS = 10
PATIENT_SECONDS = 1.0
"""For so long from its beginning an attempt to connect is waited for."""


@dataclass(frozen=True)
class Address:
    """Where a coordinator listens."""

    host: str
    port: int
    token: bytes = field(repr=False)


class CallError(Exception):
    """The coordinator could not carry out a call; the message is its own."""


@cache
def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Of values of a type: dataclasses of `messages.py`, pydantic models in them included."""
    return msgspec.msgpack.Decoder(kind, dec_hook=lambda model, value: model.model_validate(value))


def frame(message: Any) -> bytes:
    body = _ENCODER.encode(message)
    return len(body).to_bytes(4, "big") + body


def notice_a_lost_machine(writer: asyncio.StreamWriter) -> None:
    """The connection ends when its other end has been silent for SILENT_SECONDS, which no process decides."""
    known = writer.get_extra_info("socket")
    known.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    known.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS // 2)
    known.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    known.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)


async def read_frame(stream: asyncio.StreamReader) -> bytes:
    return await stream.readexactly(int.from_bytes(await stream.readexactly(4), "big"))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise NotImplementedError(f"{type(value).__name__} is no part of a message")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_ANSWER = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw, str | None])


class Link:
    """Calls to the coordinator, any number at once. Connects at the first one, and anew once a connection is lost."""

    def __init__(self, find: Callable[[], Awaitable[Address]]) -> None:
        self._find = find
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._patient_until = 0.0

    async def call(self, kind: Any, method: str, *arguments: Any) -> Any:
        """The answer, of type `kind`. Raises OSError where the coordinator is gone, CallError where it failed, and what
        `find` raises."""
        connection = self._connection
        if connection is None or connection.is_lost:
            connection = await self._connected()
        return decoder(kind).decode(await connection.call(method, arguments))

    async def _connected(self) -> "_Connection":
        """A new connection. Who calls in an attempt's first moment waits for it; then no call waits until it succeeds:
        Ray may take long to say where a coordinator is that it starts anew."""
        now = asyncio.get_running_loop().time()
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._patient_until = now + PATIENT_SECONDS
        try:
            async with asyncio.timeout_at(self._patient_until):
                return await asyncio.shield(self._connecting)
        except TimeoutError:
            raise ConnectionError("the coordinator is not to be reached yet") from None

    async def _connect(self) -> "_Connection":
        address = await self._find()
        async with asyncio.timeout(SILENT_SECONDS):
            self._connection = await _Connection.open(address)
        return self._connection

    def close(self) -> None:
        """Calls that wait fail; a later one connects anew."""
        if self._connection is not None:
            self._connection.close()


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.is_lost = False
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, address: Address) -> "_Connection":
        reader, writer = await asyncio.open_connection(address.host, address.port)
        notice_a_lost_machine(writer)
        writer.write(address.token)
        return cls(reader, writer)

    async def call(self, method: str, arguments: tuple[Any, ...]) -> msgspec.Raw:
        if self.is_lost:
            raise ConnectionResetError("the coordinator has closed the connection")
        number = next(self._numbers)
        pending = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(frame((number, method, arguments)))
            return await pending
        finally:
            self._pending.pop(number, None)

    def close(self) -> None:
        self._writer.close()

    async def _listen(self) -> None:
        try:
            while True:
                number, value, error = _ANSWER.decode(await read_frame(self._reader))
                pending = self._pending.get(number)
                if pending is None or pending.done():
                    continue  # whoever asked has gone away
                if error is None:
                    pending.set_result(value)
                else:
                    pending.set_exception(CallError(error))
        except (OSError, EOFError):
            pass
        finally:
            self.is_lost = True
            self._writer.close()
            for pending in self._pending.values():
                if not pending.done():
                    pending.set_exception(ConnectionResetError("the coordinator has closed the connection"))
