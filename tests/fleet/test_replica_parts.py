"""The parts of a replica that need no engine and no Ray: the gate, the reporter, the merged metrics page."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from replicas.exposition import merged
from replicas.gate import Gate
from replicas.headers import KIND, REFUSAL, RESERVATION, Answer, new_reservation, reservation_of
from replicas.messages import CapacityReport, ReplicaLimits
from replicas.reporter import SHORTEST_INTERVAL_SECONDS, Reporter, held_by_reservation
from triattention.report import EngineReport


class Application:
    """Stands for vLLM's: remembers the request id, and runs until it is told that the client left."""

    def __init__(self, endless: bool = False) -> None:
        self.endless = endless
        self.request_ids: list[str | None] = []
        self.saw_disconnect = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id")
        self.request_ids.append(request_id.decode() if request_id else None)
        while self.endless:
            if (await receive())["type"] == "http.disconnect":
                self.saw_disconnect = True
                return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"engine"})


class Book:
    """Which reservations came and ended, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def begin(self, reservation: str) -> None:
        self.entries.append(f"begin {reservation}")

    def finish(self, reservation: str) -> None:
        self.entries.append(f"finish {reservation}")


async def ask(gate: Gate, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://replica") as http:
        return await http.post(path, headers=headers, json={})


async def test_an_admitted_request_carries_its_reservation_into_vllm_and_ends_once() -> None:
    application, book = Application(), Book()
    reservation = new_reservation()
    headers = {RESERVATION: reservation, "x-request-id": "the-clients"}
    answer = await ask(Gate(application, book, {}), "/v1/completions", headers)
    assert answer.text == "engine"
    assert application.request_ids == [reservation]
    assert book.entries == [f"begin {reservation}", f"finish {reservation}"]


async def test_a_refused_request_never_reaches_the_engine() -> None:
    application = Application()
    refusal = Answer(429, "TooManyRequestsError", "Full: come back.", retry_after_seconds=7)
    answer = await ask(Gate(application, Book(), {}), "/v1/completions", {REFUSAL: refusal.encode()})
    assert application.request_ids == []
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["message"] == "Full: come back."


async def test_a_refusal_is_for_the_openai_endpoints_only() -> None:
    refusal = Answer(400, "BadRequestError", "no prompt").encode()
    answer = await ask(Gate(Application(), Book(), {}), "/tokenize", {REFUSAL: refusal})
    assert answer.text == "engine"


async def test_a_body_of_the_wrong_kind_for_its_path_is_refused_and_its_reservation_ends() -> None:
    application, book = Application(), Book()
    headers = {KIND: "completion", RESERVATION: "rsv1"}
    answer = await ask(Gate(application, book, {}), "/v1/chat/completions", headers)
    assert answer.status_code == 400
    assert "messages is missing" in answer.json()["error"]["message"]
    assert application.request_ids == []
    assert book.entries == ["begin rsv1", "finish rsv1"]


async def test_a_reservation_ends_when_the_application_fails() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("boom")

    book = Book()
    with pytest.raises(RuntimeError):
        await ask(Gate(broken, book, {}), "/v1/completions", {RESERVATION: "rsv1"})
    assert book.entries == ["begin rsv1", "finish rsv1"]


async def test_a_request_that_serve_cancels_sees_the_disconnect_before_it_counts_as_ended() -> None:
    class Watching(Book):
        def finish(self, reservation: str) -> None:
            assert application.saw_disconnect
            super().finish(reservation)

    application, book = Application(endless=True), Watching()
    gone: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(RESERVATION.encode(), b"rsv1")]}

    async def send(message: Any) -> None: ...

    request = asyncio.create_task(Gate(application, book, {})(scope, gone.get, send))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    # As Serve does it: the message first, then the cancellation.
    gone.put_nowait({"type": "http.disconnect"})
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert book.entries == ["begin rsv1", "finish rsv1"]


def test_vllms_request_ids_lead_back_to_their_reservation() -> None:
    reservation = new_reservation()
    for shape in ("chatcmpl-{}-1a2b3c4d", "2_chatcmpl-{}-1a2b3c4d", "cmpl-{}-0-1a2b3c4d", "1_cmpl-{}-3-1a2b3c4d"):
        assert reservation_of(shape.format(reservation)) == reservation
    assert reservation_of("chatcmpl-someone-elses-1a2b3c4d") is None


def test_blocks_of_all_sequences_of_a_request_add_up() -> None:
    one, two = new_reservation(), new_reservation()
    held = {f"0_cmpl-{one}-0-a": 3, f"1_cmpl-{one}-0-b": 4, f"chatcmpl-{two}-c": 5, "first-step-d": 9}
    assert held_by_reservation(held) == {one: 7, two: 5}


async def test_a_request_that_waits_in_the_engine_is_shown_with_no_blocks_until_it_ends() -> None:
    line = Line()
    reports = reporter(line, heartbeat_seconds=0.1)
    running = asyncio.create_task(reports.run())
    reservation = new_reservation()
    reports.begin(reservation)
    reports.observe(engine(free=10))
    await asyncio.sleep(0.03)
    assert line.reports[-1].held_blocks == {reservation: 0}
    reports.observe(engine(free=8, held_blocks={f"cmpl-{reservation}-0-a": 2}))
    await asyncio.sleep(0.15)
    assert line.reports[-1].held_blocks == {reservation: 2}
    reports.finish(reservation)
    reports.observe(engine(free=10))
    await asyncio.sleep(0.15)
    assert line.reports[-1].held_blocks == {}
    running.cancel()


class Line:
    """The way to the coordinator, which can be cut."""

    def __init__(self) -> None:
        self.reports: list[CapacityReport] = []
        self.cut = False

    async def send(self, report: CapacityReport) -> None:
        if self.cut:
            raise ConnectionError("cut")
        self.reports.append(report)


def engine(free: int, **more: Any) -> dict[str, Any]:
    report = EngineReport(
        block_size=32,
        bytes_per_block=1,
        total_blocks=10,
        free_blocks=free,
        running=0,
        waiting=0,
        in_flight_tokens=1,
        **more,
    )
    return report.to_dict()


def reporter(line: Line, heartbeat_seconds: float = 60.0) -> Reporter:
    return Reporter("r1", ReplicaLimits(100, None), heartbeat_seconds, line.send)


async def test_a_change_is_reported_at_once_and_none_is_only_the_heartbeat() -> None:
    line = Line()
    reports = reporter(line, heartbeat_seconds=0.3)
    running = asyncio.create_task(reports.run())
    reports.observe(engine(free=10))
    await asyncio.sleep(0.05)
    assert [report.engine.free_blocks for report in line.reports] == [10]
    for _ in range(20):
        reports.observe(engine(free=10))
        await asyncio.sleep(0.005)
    assert len(line.reports) == 1
    await asyncio.sleep(0.5)
    assert len(line.reports) >= 2
    running.cancel()


async def test_a_stream_of_changes_is_reported_no_faster_than_the_shortest_interval() -> None:
    line = Line()
    reports = reporter(line)
    running = asyncio.create_task(reports.run())
    for free in range(100):
        reports.observe(engine(free))
        await asyncio.sleep(0.005)
    running.cancel()
    assert 3 <= len(line.reports) <= 0.5 / SHORTEST_INTERVAL_SECONDS + 2
    assert [report.sequence for report in line.reports] == list(range(1, len(line.reports) + 1))
    assert len({report.epoch for report in line.reports}) == 1


async def test_what_ended_while_the_coordinator_was_away_is_told_when_it_is_back() -> None:
    line = Line()
    line.cut = True
    reports = reporter(line, heartbeat_seconds=0.1)
    running = asyncio.create_task(reports.run())
    reports.observe(engine(free=10))
    reports.finish("rsv1")
    await asyncio.sleep(0.2)
    line.cut = False
    reports.finish("rsv2")
    await asyncio.sleep(0.4)
    running.cancel()
    assert [ended for report in line.reports for ended in report.finished] == ["rsv1", "rsv2"]


def test_pages_of_two_engines_merge_into_families_with_a_replica_label() -> None:
    page = '# HELP vllm:a Says a.\n# TYPE vllm:a gauge\nvllm:a{x="1"} 2.0\n# HELP b B.\n# TYPE b gauge\nb 1.0\n'
    assert merged({"r1": page, "r2": page}, "vllm:").splitlines() == [
        "# HELP vllm:a Says a.",
        "# TYPE vllm:a gauge",
        'vllm:a{replica="r1",x="1"} 2.0',
        'vllm:a{replica="r2",x="1"} 2.0',
    ]
