"""The coordinator's end of `replicas.link`: hears calls of routers and replicas and answers each when it is done."""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from replicas.link import SILENT_SECONDS, Address, decoder, frame, notice_a_lost_machine, read_frame

logger = logging.getLogger("ray.serve")

TOKEN_BYTES = 32
_CALL = msgspec.msgpack.Decoder(tuple[int, str, msgspec.Raw])

Calls = Mapping[str, tuple[Any, Callable[..., Awaitable[Any]]]]
"""Method -> type of its arguments, a tuple; what is called with them."""


class Listener:
    """Calls whose connection ends are cancelled: a router that dies leaves nobody in the queue."""

    def __init__(self, calls: Calls) -> None:
        self._calls = {name: (decoder(kind), function) for name, (kind, function) in calls.items()}
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self, host: str) -> Address:
        """Listens on a free port."""
        self._server = await asyncio.start_server(self._hear, host, 0)
        return Address(host, self._server.sockets[0].getsockname()[1], self._token)

    def stop(self) -> None:
        """Hears nobody any more; what is being answered fails."""
        if self._server is not None:
            self._server.close()
        for writer in self._connections:
            writer.close()

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls: set[asyncio.Task[None]] = set()
        self._connections.add(writer)
        notice_a_lost_machine(writer)
        try:
            async with asyncio.timeout(SILENT_SECONDS):
                token = await reader.readexactly(TOKEN_BYTES)
            if not hmac.compare_digest(token, self._token):
                return
            while True:
                call = asyncio.create_task(self._answer(writer, *_CALL.decode(await read_frame(reader))))
                calls.add(call)
                call.add_done_callback(calls.discard)
        except (OSError, EOFError):
            pass
        finally:
            for call in calls:
                call.cancel()
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, number: int, method: str, arguments: msgspec.Raw) -> None:
        try:
            kind, function = self._calls[method]
            answer = frame((number, await function(*kind.decode(arguments)), None))
        except Exception as error:
            # Whoever called is told; the next call must be heard.
            logger.exception("The call %s failed.", method)
            answer = frame((number, None, f"{type(error).__name__}: {error}"))
        writer.write(answer)
