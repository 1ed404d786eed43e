"""The demo's load, result and table, against an endpoint that only looks like the fleet."""

import asyncio
import io
import json
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse
from rich.console import Console

from deploy.admission import Admission
from deploy.demo import DemoError, load_progress, result_json, run_demo, show, write_json
from deploy.exposition import render
from deploy.load import SHORTEST_LONG_OUTPUT, mixed_load
from deploy.messages import Demand
from deploy.settings import CoordinatorSettings
from tests.unit.reports import report


class FakeFleet:
    """Answers chats at once and counts a compaction per long one. `mode` makes it misbehave."""

    def __init__(self) -> None:
        self.mode = "well"
        self.core = Admission(CoordinatorSettings(), random.Random(0))
        self.count = self.compactions = 0
        self._report()
        self.app = FastAPI()
        self.app.get("/metrics")(self.metrics)
        self.app.post("/v1/chat/completions")(self.chat)

    def _report(self, **values) -> None:
        counters = {"compactions": self.compactions, "freed_blocks": 4 * self.compactions}
        made = report(sequence=self.count + 1, peak_blocks_per_request=9, **counters, **values)
        self.core.observe(made, time.monotonic())

    async def metrics(self) -> Response:
        return Response(render(self.core.snapshot(time.monotonic()), "m"), media_type="text/plain")

    async def chat(self, body: dict) -> Response:
        if self.mode == "refuses":
            error = {"message": "All replicas are full.", "type": "overloaded", "param": None, "code": 429}
            return JSONResponse({"error": error}, status_code=429)
        self.count += 1
        tokens = max(20, body["min_tokens"])
        self.compactions += tokens > 1000
        name = f"r{self.count}"
        self.core.submit(Demand(name, 10, 40), time.monotonic())
        self._report(finished=(name,))
        return StreamingResponse(self._stream(tokens), media_type="text/event-stream")

    async def _stream(self, tokens: int):
        for done in range(10, tokens + 1, 10):
            is_last = done + 10 > tokens
            if is_last and self.mode == "breaks":
                return
            chunk = {
                "id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m",
                "choices": [
                    {"index": 0, "delta": {"content": "x"}, "finish_reason": "stop" if is_last else None}
                ],
                "usage": {"prompt_tokens": 1, "completion_tokens": done, "total_tokens": done + 1},
            }  # fmt: skip
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"


@pytest.fixture
def fleet() -> Iterator[tuple[FakeFleet, str]]:
    fake = FakeFleet()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(fake.app, log_level="error"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield fake, f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def console() -> Console:
    return Console(width=120, record=True, file=io.StringIO())


def test_the_load_is_mixed_has_long_outputs_and_is_the_same_every_time():
    load = mixed_load(24)
    long = [request for request in load if request.is_long]
    assert (len(load), len(long)) == (24, 16)
    assert all(request.min_tokens == SHORTEST_LONG_OUTPUT >= 1500 for request in long)
    assert all(request.max_tokens > request.min_tokens for request in load)
    assert load == mixed_load(24)


def test_a_run_counts_its_own_tokens_compactions_and_placements(fleet, console):
    _, endpoint = fleet
    run_demo(endpoint, "m", console, requests=6)
    result = run_demo(endpoint, "m", console, requests=6)  # what came before does not count
    assert (result.requests, result.errors) == (6, 0)
    assert result.output_tokens == 4 * 1500 + 2 * 20
    assert (result.compactions, result.freed_blocks, result.stranded_slots) == (4, 16, 0)
    assert result.placements == {"a": 6}
    assert result.peak_blocks_per_request == 9
    assert result.tokens_per_second > 0
    assert result.first_token_seconds_short is not None


def test_the_json_has_the_promised_keys(fleet, console, tmp_path):
    _, endpoint = fleet
    result = run_demo(endpoint, "m", console, requests=3)
    alone = {
        "requests", "errors", "output_tokens", "compactions", "freed_blocks", "reclaimed_bytes", "stranded_slots",
        "preemptions", "peak_blocks_per_request", "tokens_per_second", "placements",
    }  # fmt: skip
    compared = {"peak_blocks_per_request", "tokens_per_second", "preemptions"}
    assert set(result_json(result)) == alone
    write_json(tmp_path / "out.json", result, result)
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written) == alone | {f"{name}_uncompressed" for name in compared}


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("refuses", "HTTP 429: All replicas are full."),
        ("breaks", "The stream ended after 10 tokens without a finish reason."),
    ],
)
def test_failed_requests_are_counted_and_told_in_a_sentence(fleet, console, mode, sentence):
    fake, endpoint = fleet
    fake.mode = mode
    result = run_demo(endpoint, "m", console, requests=3)
    assert result.errors == 3
    assert sentence in result.error_sentences
    show(console, result)
    assert sentence in console.export_text()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_progress_shows_count_pace_and_time_in_every_usual_terminal(width):
    console = Console(width=width, record=True, file=io.StringIO())
    progress = load_progress(console)
    progress.add_task(
        "Without compression", total=36, completed=12, tokens=48_126, rate=1486.0, headroom="headroom 238 238 blocks"
    )
    console.print(progress.get_renderable())
    shown = console.export_text()
    for part in ("Without compression", "12/36", "48,126 tokens", "1,486 tokens/s", "0:00:00"):
        assert part in shown
    assert ("headroom 238 238 blocks" in shown) == (width == 120)


def test_an_empty_key_is_none(fleet, console, monkeypatch):
    monkeypatch.setenv("TRIFLEET_KEY", "")
    _, endpoint = fleet
    assert run_demo(endpoint, "m", console, requests=3).errors == 0


def test_the_table_compares_both_runs(fleet, console):
    _, endpoint = fleet
    result = run_demo(endpoint, "m", console, requests=3)
    show(console, result, result)
    shown = console.export_text()
    assert "with compression" in shown
    assert "1.0 times the tokens per second" in shown


def test_without_a_fleet_the_demo_says_so(console):
    with pytest.raises(DemoError, match="is the fleet up"):
        run_demo("http://127.0.0.1:9", "m", console, requests=3)
