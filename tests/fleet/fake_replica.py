"""A replica like any other but for its engine, which is fake: it only counts, waits and writes words.

For what depends on Ray, Serve, HAProxy, the router and the coordinator alone, and on many replicas that come and go:
a fake engine starts in no time. `fake_fleet.py` starts a fleet of them.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from prometheus_client import Metric
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from replicas.replica import Replica
from triattention.report import EngineReport

BLOCK, BLOCKS = 16, 40
TOKEN_SECONDS = 0.02
REPORT_SECONDS = 0.02


class FakeEngine:
    """Answers completions with `max_tokens` words, one every 20 ms; `wait 3` in the prompt delays the first by 3 s."""

    def __init__(self, listener: Callable[[dict[str, Any]], None]) -> None:
        self._listener = listener
        self._tokens: dict[str, tuple[int, int]] = {}
        self._ended: dict[str, tuple[int, int]] = {}
        self._reports = asyncio.create_task(self._report())
        self.is_dead = False
        self.cors: dict[str, Any] = {"allow_origins": ["*"]}
        self.app = Starlette(routes=[Route("/v1/completions", self._complete, methods=["POST"])])

    def check(self) -> None:
        pass

    def stop(self) -> None:
        self._reports.cancel()

    def metrics(self) -> str:
        return ""

    def families(self) -> list[Metric]:
        return []

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        name = f"cmpl-{request.headers['x-request-id']}-0-0a1b2c3d"
        wait = re.search(r"wait (\d+)", body["prompt"])
        words = self._words(name, int(body["max_tokens"]), float(wait.group(1)) if wait else 0.0)
        if body.get("stream"):
            return StreamingResponse(self._events(words), media_type="text/event-stream")
        text = " ".join([word async for word in words])
        usage = {"prompt_tokens": BLOCK, "completion_tokens": body["max_tokens"]}
        return JSONResponse({"choices": [{"text": text, "finish_reason": "length"}], "usage": usage})

    async def _words(self, name: str, count: int, wait: float) -> AsyncIterator[str]:
        self._tokens[name] = (BLOCK, 0)
        try:
            await asyncio.sleep(wait)
            for number in range(count):
                await asyncio.sleep(TOKEN_SECONDS)
                self._tokens[name] = (BLOCK, number + 1)
                yield f"word{number}"
        finally:
            self._ended[name] = self._tokens.pop(name)

    async def _events(self, words: AsyncIterator[str]) -> AsyncIterator[str]:
        async for word in words:
            yield f"data: {json.dumps({'choices': [{'text': word}]})}\n\n"
        yield "data: [DONE]\n\n"

    async def _report(self) -> None:
        while True:
            held = {name: math.ceil((prompt + output) / BLOCK) for name, (prompt, output) in self._tokens.items()}
            ended, self._ended = self._ended, {}
            report = EngineReport(
                block_size=BLOCK,
                bytes_per_block=1,
                total_blocks=BLOCKS,
                free_blocks=BLOCKS - sum(held.values()),
                running=len(held),
                waiting=0,
                in_flight_tokens=2,
                held_blocks=held,
                ended=ended,
            )
            self._listener(report.to_dict())
            await asyncio.sleep(REPORT_SECONDS)


class FakeEngineReplica(Replica):
    async def _start_engine(
        self, listener: Callable[[dict[str, Any]], None], on_end: Callable[[str, float], None]
    ) -> Any:
        return FakeEngine(listener)
