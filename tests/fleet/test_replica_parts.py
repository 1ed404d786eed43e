"""The parts of a replica that need no engine and no Ray: the gate, the reporter, the merged metrics page."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from replicas.exposition import merged
from replicas.gate import Gate
from replicas.headers import KIND, OUTPUT_LIMIT, REFUSAL, RESERVATION, Answer, new_reservation, reservation_of
from replicas.messages import CapacityReport, ReplicaLimits
from replicas.reporter import SHORTEST_INTERVAL_SECONDS, Reporter, by_reservation
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

    def begin(self, reservation: str, tier: str, length_class: str, waited_seconds: float) -> None:
        self.entries.append(f"begin {reservation}")

    def answered(self, reservation: str) -> None:
        self.entries.append(f"answered {reservation}")

    def usage(self, reservation: str) -> tuple[str, float]:
        return "gold", 12.3456

    def finish(self, reservation: str) -> None:
        self.entries.append(f"finish {reservation}")


async def ask(gate: Gate, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://replica") as http:
        return await http.post(path, headers=headers, json={})


async def test_an_admitted_request_carries_its_reservation_into_vllm_and_ends_once() -> None:
    application, book = Application(), Book()
    reservation = new_reservation()
    headers = {RESERVATION: reservation, "x-request-id": reservation}
    answer = await ask(Gate(application, book, {}), "/v1/completions", headers)
    assert answer.text == "engine"
    assert application.request_ids == [reservation]
    assert book.entries == [f"begin {reservation}", f"answered {reservation}", f"finish {reservation}"]


async def test_a_refused_request_never_reaches_the_engine() -> None:
    application = Application()
    refusal = Answer(429, "TooManyRequestsError", "Full: come back.", retry_after_seconds=7)
    answer = await ask(Gate(application, Book(), {}), "/v1/completions", {REFUSAL: refusal.encode()})
    assert application.request_ids == []
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["message"] == "Full: come back."


@pytest.mark.parametrize("path", ["/invocations", "/inference/v1/generate", "/v1/chat/completions/batch"])
async def test_what_would_generate_unbooked_is_not_served(path: str) -> None:
    application = Application()
    answer = await ask(Gate(application, Book(), {}), path, {})
    assert (answer.status_code, application.request_ids) == (404, [])
    assert "/v1/chat/completions" in answer.json()["error"]["message"]
    assert (await ask(Gate(application, Book(), {}), "/tokenize", {})).text == "engine"


@pytest.mark.parametrize(
    ("path", "judged"), [("/v1/chat/completions", "completion"), ("/v1/completions", "nothing"), ("/tokenize", "chat")]
)
async def test_a_path_that_the_router_read_otherwise_is_refused_and_its_reservation_ends(
    path: str, judged: str
) -> None:
    application, book = Application(), Book()
    answer = await ask(Gate(application, book, {}), path, {KIND: judged, RESERVATION: "rsv1"})
    assert answer.status_code == 400
    assert application.request_ids == []
    assert book.entries == ["begin rsv1", "finish rsv1"]


async def test_a_reservation_ends_when_the_application_fails() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("boom")

    book = Book()
    with pytest.raises(RuntimeError):
        await ask(Gate(broken, book, {}), "/v1/completions", {RESERVATION: "rsv1"})
    assert book.entries == ["begin rsv1", "finish rsv1"]


@pytest.mark.parametrize("is_told", [True, False])
async def test_a_request_that_serve_cancels_sees_a_disconnect_before_it_counts_as_ended(is_told: bool) -> None:
    """Of a client that left Serve says so before it cancels; of a time that is over it says nothing."""

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
    if is_told:
        gone.put_nowait({"type": "http.disconnect"})
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(request, 1)
    assert book.entries == ["begin rsv1", "finish rsv1"]


# -- the answer on its way ---------------------------------------------------------------------------------------


class Answering:
    """Stands for vLLM's application: answers with these pieces."""

    def __init__(self, *pieces: bytes, kind: str = "text/event-stream") -> None:
        self.pieces = pieces
        self.kind = kind
        self.dies_before: int | None = None
        self.is_dead = False
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        headers = [(b"content-type", self.kind.encode())]
        if len(self.pieces) == 1:
            headers.append((b"content-length", str(len(self.pieces[0])).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, piece in enumerate(self.pieces):
            self.is_dead = self.is_dead or self.dies_before == number
            await send({"type": "http.response.body", "body": piece, "more_body": len(self.pieces) > 1})
        if len(self.pieces) > 1:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def messages_of(application: Answering, headers: dict[str, str], path: str = "/v1/completions") -> list[Any]:
    """What the gate sends, message by message: httpx would not show where a transfer breaks."""
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    parts = [
        {"type": "http.request", "body": b'{"model":', "more_body": True},
        {"type": "http.request", "body": b'"m"}', "more_body": False},
    ]

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await Gate(application, Book(), {}, lambda: application.is_dead)(scope, receive, send)
    return sent


async def test_nothing_is_answered_before_the_first_byte_so_that_a_dead_engine_can_be_replaced() -> None:
    application = Answering(b'data: {"error": {"message": "dead"}}\n\n', b"data: [DONE]\n\n")
    application.dies_before = 0
    start, body = await messages_of(application, {RESERVATION: "rsv1"})
    assert start["status"] == 502
    assert json.loads(body["body"])["error"]["code"] == 502
    assert not body.get("more_body", False)


async def test_a_stream_that_fails_later_ends_with_its_error_event_and_no_clean_end() -> None:
    error = b'data: {"error": {"message": "x"}}\n\n'
    application = Answering(b'data: {"choices":[1]}\n\n', error, b"data: [DONE]\n\n")
    sent = await messages_of(application, {RESERVATION: "rsv1"})
    assert [message.get("body") for message in sent[1:]] == list(application.pieces[:2])
    assert all(message["more_body"] for message in sent[1:])


async def test_the_usage_of_a_whole_answer_says_what_it_took() -> None:
    application = Answering(b'{"choices":[{"text":"x"}],"usage":{"prompt_tokens":3}}', kind="application/json")
    start, body = await messages_of(application, {RESERVATION: "rsv1"})
    usage = json.loads(body["body"])["usage"]
    assert usage == {"prompt_tokens": 3, "trifleet": {"tier": "gold", "kv_block_seconds": 12.346}}
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()


async def test_the_last_event_of_a_stream_says_what_it_took_and_the_others_are_untouched() -> None:
    first = b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":3}}\n\n'
    last = b'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\n'
    sent = await messages_of(Answering(first, last, b"data: [DONE]\n\n"), {RESERVATION: "rsv1"})
    assert sent[1]["body"] == first
    assert json.loads(sent[2]["body"].removeprefix(b"data: "))["usage"]["trifleet"]["tier"] == "gold"
    assert sent[2]["body"].endswith(b"\n\n")
    assert sent[3]["body"] == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/completions", "max_tokens"), ("/v1/chat/completions", "max_completion_tokens")]
)
async def test_a_tiers_output_limit_is_put_into_the_body(path: str, field: str) -> None:
    application = Answering(b"ok")
    await messages_of(application, {RESERVATION: "rsv1", OUTPUT_LIMIT: "17", "content-length": "13"}, path)
    assert json.loads(application.body) == {"model": "m", field: 17}


@pytest.mark.parametrize("headers", [{RESERVATION: "rsv1", OUTPUT_LIMIT: "17"}, {}])
async def test_a_response_gets_its_id_in_the_body_where_vllm_looks_for_it(headers: dict[str, str]) -> None:
    application = Answering(b"ok")
    await messages_of(application, {**headers, "x-request-id": "rsv1", "content-length": "13"}, "/v1/responses")
    limit = {"max_output_tokens": 17} if headers else {}
    assert json.loads(application.body) == {"model": "m", "request_id": "resp_rsv1", **limit}


def test_vllms_request_ids_lead_back_to_their_reservation() -> None:
    reservation = new_reservation()
    for shape in (
        "chatcmpl-{}-1a2b3c4d",
        "2_chatcmpl-{}-1a2b3c4d",
        "cmpl-{}-0-1a2b3c4d",
        "1_cmpl-{}-3-1a2b3c4d",
        "resp_{}_0-1a2b3c4d",
    ):
        assert reservation_of(shape.format(reservation)) == reservation
    assert reservation_of("chatcmpl-someone-elses-1a2b3c4d") is None


def test_blocks_of_all_sequences_of_a_request_add_up() -> None:
    one, two = new_reservation(), new_reservation()
    held = {f"0_cmpl-{one}-0-a": 3, f"1_cmpl-{one}-0-b": 4, f"chatcmpl-{two}-c": 5, "first-step-d": 9}
    assert by_reservation(held) == {one: 7, two: 5}


async def test_a_request_that_waits_in_the_engine_is_shown_with_no_blocks_until_it_ends() -> None:
    line = Line()
    reports = reporter(line, heartbeat_seconds=0.1)
    running = asyncio.create_task(reports.run())
    reservation = new_reservation()
    reports.begin(reservation, "gold", "short", 0.0)
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


def test_output_tokens_are_told_of_running_and_finished_requests_over_all_their_sequences() -> None:
    reports = reporter(Line())
    one, two, foreign = new_reservation(), new_reservation(), new_reservation()
    first, second, other = f"0_cmpl-{one}-0-a", f"1_cmpl-{one}-0-b", f"cmpl-{two}-0-c"

    def told() -> dict[str, int]:
        report = reports.report()
        assert report is not None
        return report.output_tokens

    reports.begin(one, "gold", "short", 0.0)
    reports.begin(two, "gold", "short", 0.0)
    reports.observe(engine(8, output_tokens={first: 5, second: 5, other: 7, f"cmpl-{foreign}-0-d": 3}))
    assert told() == {one: 10, two: 7}
    # The first has ended, and with it goes what the engine tells of it while it runs.
    reports.observe(engine(8, output_tokens={second: 6, other: 8}, ended={first: (3, 6)}))
    assert told() == {one: 12, two: 8}
    # Its end is heard of before the engine's next report: the last count stands.
    reports.finish(two)
    assert told() == {one: 12, two: 8}
    reports.finish(one)
    reports.observe(engine(10, ended={second: (3, 9), other: (3, 9)}))
    assert told() == {one: 15, two: 9}


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
    began = time.monotonic()
    running = asyncio.create_task(reports.run())
    for free in range(100):
        reports.observe(engine(free))
        await asyncio.sleep(0.005)
    running.cancel()
    assert 3 <= len(line.reports) <= (time.monotonic() - began) / SHORTEST_INTERVAL_SECONDS + 2
    assert [report.sequence for report in line.reports] == list(range(1, len(line.reports) + 1))
    assert len({report.epoch for report in line.reports}) == 1


async def test_what_ended_while_the_coordinator_was_away_is_told_when_it_is_back() -> None:
    line = Line()
    line.cut = True
    reports = reporter(line, heartbeat_seconds=0.1)
    running = asyncio.create_task(reports.run())
    reports.observe(engine(free=10))
    for reservation in ("rsv1", "rsv2"):
        reports.begin(reservation, "gold", "short", 0.0)
    reports.finish("rsv1")
    await asyncio.sleep(0.2)
    line.cut = False
    reports.finish("rsv2")
    await asyncio.sleep(0.4)
    running.cancel()
    assert [ended for report in line.reports for ended in report.finished] == ["rsv1", "rsv2"]
    assert [reports._finished, reports._written, reports._ended] == [{}, {}, {}]


@pytest.mark.parametrize("turns", range(4))
async def test_a_reporter_that_is_cancelled_ends_also_when_a_change_comes_with_it(turns: int) -> None:
    reports = reporter(Line())
    running = asyncio.create_task(reports.run())
    await asyncio.sleep(0.01)
    reports.begin("a", "default", "short", 0.0)
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=1)
    running.cancel()
    assert done


def test_pages_of_two_engines_merge_into_families_with_a_replica_label() -> None:
    page = '# HELP vllm:a Says a.\n# TYPE vllm:a gauge\nvllm:a{x="1"} 2.0\n# HELP b B.\n# TYPE b gauge\nb 1.0\n'
    assert merged({"r1": page, "r2": page}, "vllm:").splitlines() == [
        "# HELP vllm:a Says a.",
        "# TYPE vllm:a gauge",
        'vllm:a{replica="r1",x="1"} 2.0',
        'vllm:a{replica="r2",x="1"} 2.0',
    ]
