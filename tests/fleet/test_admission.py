"""What the fleet does with requests as they come, end and fail: reservations, refusals, placement."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from replicas.headers import KIND, REFUSAL, RESERVATION, Answer
from tests.fleet.conftest import MAX_MODEL_LEN, MODEL, RunningFleet

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
LONG = {"model": MODEL, "prompt": "go on", "max_tokens": 1200, "ignore_eos": True, "stream": True}


def test_both_replicas_are_used(fleet: RunningFleet) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=fleet.url, timeout=120) as http:
            body = {**CHAT, "max_tokens": 60, "ignore_eos": True}
            answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for _ in range(8)))
            assert [answer.status_code for answer in answers] == [200] * 8

    asyncio.run(run())
    placed = httpx.get(f"{fleet.url}/fleet").json()["placements"]
    assert len([replica for replica, reasons in placed.items() if sum(reasons.values()) > 0]) == 2


def test_a_running_request_is_held_under_its_reservation(fleet: RunningFleet) -> None:
    fleet.await_whole_pool(seconds=2)
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(30):
            next(lines)
        time.sleep(0.3)
        now = fleet.samples()
        assert now["trifleet_reservations"] == 1
        assert now["trifleet_ledger_drift_blocks"] == 0
        assert now["trifleet_predicted_blocks"] > 0


def test_a_cancelled_stream_frees_its_blocks_within_a_second(fleet: RunningFleet) -> None:
    fleet.await_whole_pool(seconds=2)
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(50):
            next(lines)
        assert not fleet.pool_is_whole()
    fleet.await_whole_pool(seconds=1)


def test_a_cancelled_request_without_stream_frees_its_blocks_within_a_second(fleet: RunningFleet) -> None:
    fleet.await_whole_pool(seconds=2)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fleet.url}/v1/completions", json={**LONG, "stream": False}, timeout=0.7)
    fleet.await_whole_pool(seconds=1)


def test_a_full_queue_answers_429_with_retry_after(fleet: RunningFleet) -> None:
    """Two replicas hold a few long requests each and four may wait: of forty, many are refused at once."""

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=fleet.url, timeout=120) as http:
            body = {**LONG, "stream": False, "max_tokens": 300}
            return await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(40)))

    answers = asyncio.run(run())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert "queue_length" in answer.json()["error"]["message"]
    fleet.await_whole_pool(seconds=2)


def test_clients_that_leave_the_queue_give_their_places_back(fleet: RunningFleet) -> None:
    """HAProxy does not tell the router that a waiting client left: what it was given ends with the lease."""

    async def run() -> None:
        async with httpx.AsyncClient(base_url=fleet.url, timeout=120) as http:
            # Eight sequences of a long request leave room for no other on the same replica.
            body = {**LONG, "stream": False, "n": 8, "max_tokens": 1900, "temperature": 1}
            requests = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(4)]
            await asyncio.sleep(1)
            queue = (await http.get("/fleet")).json()["queue_length"]
            assert sum(queue.values()) == 2
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)

    asyncio.run(run())
    fleet.await_whole_pool(seconds=8)
    assert fleet.samples()["trifleet_queue_length"] == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "gpt-9"}, 404, "The model `gpt-9` does not exist"),
        ("/v1/chat/completions", {"model": MODEL}, 400, "messages"),
        ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400, "messages is empty"),
        ("/v1/chat/completions", {"model": MODEL, "messages": ["hi"]}, 400, "messages[0] is not a message"),
        ("/v1/chat/completions", {"model": MODEL, "prompt": "hi"}, 400, "messages is missing"),
        ("/v1/completions", {**CHAT}, 400, "prompt is missing"),
        ("/v1/completions", {"model": MODEL, "prompt": {}}, 400, "prompt is not a prompt"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": -5}, 400, "max_tokens is -5"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": "many"}, 400, 'max_tokens is "many"'),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 0}, 400, "max_completion_tokens is 0"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 100_000}, 400, f"max_model_len is {MAX_MODEL_LEN}"),
        ("/v1/completions", {"model": MODEL, "prompt": [5] * 3000}, 400, "The prompt has 3000 tokens"),
        ("/v1/chat/completions", {**CHAT, "n": 0}, 400, "n is 0"),
        ("/v1/chat/completions", {**CHAT, "n": 500}, 400, "limits.choices"),
        ("/v1/chat/completions", {**CHAT, "n": 16, "max_tokens": 1900}, 400, "KV pool"),
        ("/v1/chat/completions", {**CHAT, "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", b"{not json", 400, "not valid JSON"),
        ("/v1/chat/completions", b"", 400, "not valid JSON"),
        ("/v1/chat/completions", b"\xff\xfe{}", 400, "not valid JSON"),
        ("/v1/chat/completions", b"[1, 2]", 400, "not a JSON object"),
        ("/v1/chat/completions", b'{"model": ' + b"[" * 100_000, 400, "JSON"),
    ],
)
def test_bad_input_gets_an_openai_error_with_a_sentence(
    fleet: RunningFleet, path: str, body: dict[str, object] | bytes, status: int, sentence: str
) -> None:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx.post(f"{fleet.url}{path}", headers={"content-type": "application/json"}, timeout=30, **content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error["type"]
    assert "Traceback" not in answer.text


def test_the_openai_client_raises_its_own_error_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=CHAT["messages"])
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model=MODEL, messages=CHAT["messages"], max_tokens=-1)


def test_a_body_over_the_buffer_is_refused_by_size(fleet: RunningFleet) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "x" * 3_000_000}]}
    answer = httpx.post(f"{fleet.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 413
    assert "limits.body_bytes" in answer.json()["error"]["message"]


def test_a_body_over_the_buffer_that_names_no_length_is_refused_by_size_as_well(fleet: RunningFleet) -> None:
    pieces = (b'{"prompt": "', *[b"x" * 50_000] * 60, b'"}')
    answer = httpx.post(f"{fleet.url}/v1/completions", content=iter(pieces), timeout=60)
    assert answer.status_code == 413
    assert "limits.body_bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"model": MODEL, "input": "hello", "max_output_tokens": 200, "request_id": "rsv" + "0" * 32}),
        ("/v1/messages", {"model": MODEL, "messages": CHAT["messages"], "max_tokens": 200}),
    ],
)
def test_the_other_endpoints_are_booked_under_their_own_reservation(
    fleet: RunningFleet, path: str, body: dict[str, object]
) -> None:
    before = fleet.samples()["trifleet_admissions_total"]
    answer = httpx.post(f"{fleet.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["trifleet"]["kv_block_seconds"] > 0
    assert "rsv" + "0" * 32 not in answer.text
    assert fleet.samples()["trifleet_admissions_total"] == before + 1
    fleet.await_whole_pool(seconds=2)


def test_what_generates_nothing_is_answered_without_a_booking(fleet: RunningFleet) -> None:
    before = fleet.samples()["trifleet_admissions_total"]
    for path, body in (
        ("/tokenize", {"model": MODEL, "prompt": "hello"}),
        ("/detokenize", {"model": MODEL, "tokens": [5, 6]}),
        ("/v1/messages/count_tokens", {"model": MODEL, "messages": CHAT["messages"]}),
    ):
        answer = httpx.post(f"{fleet.url}{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    assert httpx.post(f"{fleet.url}/invocations", json=CHAT, timeout=60).status_code == 404
    assert fleet.samples()["trifleet_admissions_total"] == before


def test_a_path_in_another_spelling_is_booked_as_well(fleet: RunningFleet) -> None:
    before = fleet.samples()["trifleet_admissions_total"]
    answer = httpx.post(f"{fleet.url}/v1/%63ompletions", json={"model": MODEL, "prompt": "hi", "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert fleet.samples()["trifleet_admissions_total"] == before + 1


def test_refusals_are_counted_by_reason(fleet: RunningFleet) -> None:
    def count() -> float:
        return float(httpx.get(f"{fleet.url}/fleet").json()["rejections"].get("unknown_model", 0))

    before = count()
    httpx.post(f"{fleet.url}/v1/chat/completions", json={**CHAT, "model": "nobody"})
    deadline = time.monotonic() + 2
    while count() != before + 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_forged_trusted_headers_are_ignored(fleet: RunningFleet) -> None:
    before = fleet.samples()["trifleet_admissions_total"]
    forged = {
        REFUSAL: Answer(418, "Forged", "forged").encode(),
        RESERVATION: "rsv" + "0" * 32,
        KIND: "completion",
    }
    answer = httpx.post(f"{fleet.url}/v1/chat/completions", json={**CHAT, "max_tokens": 3}, headers=forged, timeout=60)
    assert answer.status_code == 200
    assert "rsv" + "0" * 32 not in answer.text
    assert fleet.samples()["trifleet_admissions_total"] == before + 1
    fleet.await_whole_pool(seconds=2)


def test_metrics_have_every_family_for_both_replicas(fleet: RunningFleet) -> None:
    from deploy.metrics import METRICS

    answer = httpx.get(f"{fleet.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for metric in METRICS:
        assert f"# TYPE {metric.name.removesuffix('_total')}" in answer.text or metric.name in answer.text
    replicas = {line.split('replica="')[1].split('"')[0] for line in answer.text.splitlines() if 'replica="' in line}
    assert len(replicas) == 2


def test_the_engines_own_metrics_come_from_both_replicas_under_their_own_names(fleet: RunningFleet) -> None:
    page = httpx.get(f"{fleet.url}/metrics/engines").text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    running = families["vllm:num_requests_running"].samples
    assert len({sample.labels["replica"] for sample in running}) == 2
    assert families["vllm:time_to_first_token_seconds"].type == "histogram"


@contextlib.contextmanager
def no_coordinator(fleet: RunningFleet) -> Iterator[None]:
    """Ray starts a dead one anew within a second on some machines: each is killed as soon as it appears."""
    has_begun, is_over = threading.Event(), threading.Event()

    def kill() -> None:
        while not is_over.is_set():
            for process in fleet.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::Coordinator" in " ".join(process.cmdline()):
                        process.kill()
                        has_begun.set()
            time.sleep(0.02)

    killing = threading.Thread(target=kill)
    killing.start()
    try:
        assert has_begun.wait(5)
        yield
    finally:
        is_over.set()
        killing.join()


def fleet_placements(fleet: RunningFleet) -> Counter[str]:
    """How many requests were placed for which reason."""
    placed: Counter[str] = Counter()
    for reasons in httpx.get(f"{fleet.url}/fleet").json()["placements"].values():
        placed.update(reasons)
    return placed


def are_reachable(fleet: RunningFleet) -> bool:
    replicas = httpx.get(f"{fleet.url}/fleet").json().get("replicas", ())  # a sentence while there is no coordinator
    return len(replicas) == 2 and all(replica["reachable"] for replica in replicas)


def test_without_a_coordinator_requests_flow_and_it_comes_back_with_its_ledger(fleet: RunningFleet) -> None:
    fleet.await_whole_pool(seconds=2)
    short = {"model": MODEL, "prompt": "hi", "max_tokens": 4}
    # It must outlast the new coordinator's start: a fast machine writes 1,200 tokens in less.
    longest = LONG | {"max_tokens": MAX_MODEL_LEN - 48}
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=longest, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(20):
            next(lines)
        with no_coordinator(fleet), ThreadPoolExecutor(4) as senders:
            url = f"{fleet.url}/v1/completions"
            sent = [senders.submit(httpx.post, url, json=short, timeout=60) for _ in range(4)]
            assert [each.result().status_code for each in sent] == [200] * 4
        deadline = time.monotonic() + 20
        # The new coordinator books the running stream again from its replica's reports.
        while fleet.samples().get("trifleet_reservations") != 1:
            assert time.monotonic() < deadline, fleet.samples()
            time.sleep(0.1)
        # A router reaches it by a connection of its own, and then says where requests get.
        while not are_reachable(fleet):
            assert time.monotonic() < deadline, "no router has reached the new coordinator"
            time.sleep(0.1)
    fleet.await_whole_pool(seconds=1)
    httpx.post(f"{fleet.url}/v1/completions", json=short, timeout=60)
    deadline = time.monotonic() + 2
    # Routers tell it what they did alone, in the background of the next answer.
    while fleet_placements(fleet)["without_coordinator"] < 4:
        assert time.monotonic() < deadline, fleet_placements(fleet)
        time.sleep(0.05)


def test_after_everything_the_pool_is_whole(fleet: RunningFleet) -> None:
    fleet.await_whole_pool(seconds=2)
    assert fleet.samples()["trifleet_queue_length"] == 0
