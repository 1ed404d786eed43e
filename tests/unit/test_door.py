"""The door of a replica: keys, paths and every limit, at the limit and one over. No engine, no Ray."""

import asyncio
import base64
import errno
import hashlib
import logging
import os
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from deploy.settings import SettingsError, parse_settings
from deploy.tiers import Tier, keyring
from replicas.access import Access, Keyring, KeysFileError
from replicas.door import Door
from replicas.gate import Gate
from replicas.headers import REFUSAL, RESERVATION, Answer
from replicas.limits import RequestLimits
from replicas.turnstile import Allowance
from tests.fleet.test_replica_parts import Book
from tests.unit.test_limits import SMALL

KEY, ADMIN_KEY = "tf-a-key-of-gold", "tf-an-admin-key"


def line(key, tier):
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {tier}\n"


class Engine:
    """Stands for vLLM's application; remembers what reached it."""

    def __init__(self):
        self.bodies, self.ids, self.ended = [], [], 0
        self.hold = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/detokenize", self.slow, methods=["POST"]),
                Route("/v1/messages", self.stream, methods=["POST"]),
                Route("/{rest:path}", self.answer, methods=["GET", "POST"]),
            ]
        )

    async def answer(self, request: Request):
        self.bodies.append(await request.body())
        self.ids.append(request.headers.get("x-request-id"))
        return JSONResponse({"ok": True})

    async def slow(self, request: Request):
        await request.body()
        waiting = asyncio.ensure_future(self.hold.wait())
        while not self.hold.is_set():
            leaving = asyncio.ensure_future(request._receive())
            await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                self.ended += 1
                raise RuntimeError("the client has left")
            leaving.cancel()
        return JSONResponse({"ok": True})

    async def stream(self, request: Request):
        async def pieces():
            try:
                while True:
                    yield b"data: x\n\n"
                    await asyncio.sleep(0.01)
            finally:
                self.ended += 1

        return StreamingResponse(pieces())


def fleet_door(engine, *, required=False, keys=None, limits=None, allowances=None, book=None):
    book = book or Book()
    ring = keys if keys is not None else Keyring({})
    return Door(Gate(engine.app, book, {}), Access(ring, required), limits or RequestLimits(), allowances or {}, book)


def http(door):
    """A client of the door as Serve runs it: behind what gives every request an id."""
    transport = httpx.ASGITransport(RequestIdMiddleware(door), raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://replica")


@pytest.fixture
def keys_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who is who\n" + line(KEY, "gold") + line(ADMIN_KEY, "admin  # Prometheus"))
    return file


@pytest.fixture
def ring(keys_file):
    return Keyring({}, keys_file, frozenset({"gold"}))


def bearer(key):
    return {"authorization": f"Bearer {key}"}


CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("path", "nobody", "client", "admin"),
    [
        ("POST /v1/chat/completions", 401, 200, 200),
        ("POST /tokenize", 401, 200, 200),
        ("GET /v1/models", 401, 200, 200),
        ("GET /metrics", 401, 403, 200),
        ("GET /metrics/engines", 401, 403, 200),
        ("GET /fleet", 401, 403, 200),
        ("POST /v1/load_lora_adapter", 401, 403, 404),
        ("POST /v1/chat/completions/", 401, 403, 404),
        ("GET /openapi.json", 401, 403, 200),
        ("GET /health", 200, 200, 200),
    ],
)
async def test_every_path_has_its_rule(ring, path, nobody, client, admin):
    method, path = path.split()
    async with http(fleet_door(Engine(), required=True, keys=ring)) as ask:
        for headers, status in (
            ({}, nobody),
            (bearer("wrong"), nobody),
            (bearer(KEY), client),
            (bearer(ADMIN_KEY), admin),
        ):
            answer = await ask.request(method, path, json=CHAT, headers=headers)
            assert answer.status_code == status, (path, headers)
            assert answer.headers["x-request-id"]


async def test_a_browser_is_asked_for_the_admin_key_and_may_send_it_as_a_password(ring):
    async with http(fleet_door(Engine(), required=True, keys=ring)) as ask:
        assert (await ask.get("/fleet")).headers["www-authenticate"].startswith("Basic")
        assert (await ask.get("/v1/models")).headers["www-authenticate"] == "Bearer"
        password = base64.b64encode(f"me:{ADMIN_KEY}".encode()).decode()
        assert (await ask.get("/fleet", headers={"authorization": f"Basic {password}"})).status_code == 200
        assert (await ask.get("/fleet", headers={b"authorization": b"Basic \xff!"})).status_code == 401


async def test_without_required_keys_everybody_is_let_in(ring):
    async with http(fleet_door(Engine(), keys=ring)) as ask:
        assert (await ask.get("/metrics")).status_code == 200
        assert (await ask.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_a_refused_request_reaches_no_engine_and_gives_its_booking_back(ring):
    engine, book = Engine(), Book()
    async with http(fleet_door(engine, required=True, keys=ring, book=book)) as ask:
        answer = await ask.post("/v1/completions", json={}, headers={RESERVATION: "rsv1"})
    assert (answer.status_code, engine.bodies) == (401, [])
    assert book.entries == ["begin rsv1", "finish rsv1"]


async def test_the_routers_refusal_is_answered_with_an_id():
    refusal = Answer(429, "TooManyRequestsError", "Full.", retry_after_seconds=3).encode()
    tight = {"default": Allowance(requests_per_minute=1)}
    async with http(fleet_door(Engine(), allowances=tight)) as ask:
        for _ in range(3):
            answer = await ask.post("/v1/completions", json={}, headers={REFUSAL: refusal})
            assert answer.json()["error"]["message"] == "Full."
            assert answer.headers["x-request-id"]


async def test_a_client_cannot_take_the_id_of_anothers_reservation():
    engine = Engine()
    async with http(fleet_door(engine)) as ask:
        for given in ("rsv" + "0" * 32, "mine-1"):
            answer = await ask.post("/v1/completions", json={}, headers={"x-request-id": given})
            assert answer.headers.get_list("x-request-id") == [given]
        await ask.post("/v1/completions", json={}, headers={"x-request-id": "mine-1", RESERVATION: "rsv1"})
    *strangers, booked = engine.ids
    assert all(name.startswith("req") for name in strangers)
    assert booked == "rsv1"


async def test_neither_key_nor_prompt_is_logged(ring, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("ray.serve").propagate = True
    async with http(fleet_door(Engine(), required=True, keys=ring)) as ask:
        answer = await ask.post("/v1/sleep", json={"prompt": "a-secret-thought"}, headers=bearer(KEY))
        await ask.post("/v1/completions", json={"prompt": "a-secret-thought"}, headers=bearer("tf-unknown-key"))
    assert answer.headers["x-request-id"] in caplog.text
    for secret in (KEY, "tf-unknown-key", "a-secret-thought"):
        assert secret not in caplog.text


# -- keys files ----------------------------------------------------------------------------------------------------


def test_a_changed_keys_file_counts_at_once(keys_file, ring):
    assert ring.tenant(f"Bearer {KEY}").tier == "gold"
    keys_file.write_text(line("tf-another", "gold"))
    os.utime(keys_file, ns=(1, 1))
    assert not ring.tenant(f"Bearer {KEY}").is_known
    assert ring.tenant("Bearer tf-another").tier == "gold"


MISTAKES = ["sha256:12 gold", line(KEY, "silver"), line("tf-another", "gold") * 2, f"{KEY} gold", "\udcff"]


@pytest.mark.parametrize("text", MISTAKES)
def test_a_file_with_a_mistake_is_refused_at_the_start(keys_file, text):
    keys_file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KeysFileError) as caught:
        Keyring({}, keys_file, frozenset({"gold"}))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("text", MISTAKES)
def test_later_a_line_with_a_mistake_is_said_once_and_revocations_beside_it_hold(keys_file, ring, text, caplog):
    logging.getLogger("ray.serve").propagate = True
    keys_file.write_bytes(f"{text.strip()}\n{line('tf-new', 'gold')}".encode(errors="surrogateescape"))
    for _ in range(3):
        assert not ring.tenant(f"Bearer {KEY}").is_known
        assert not ring.tenant(f"Bearer {ADMIN_KEY}").is_known
        assert ring.tenant("Bearer tf-new").tier == "gold"
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "does not count" in said
    assert KEY not in said


def test_a_file_that_cannot_be_read_leaves_the_keys_as_they_were_and_is_said_once(keys_file, ring, caplog):
    logging.getLogger("ray.serve").propagate = True
    keys_file.unlink()
    for _ in range(3):
        assert ring.tenant(f"Bearer {KEY}").tier == "gold"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    keys_file.write_text(line("tf-another", "gold"))
    assert ring.tenant("Bearer tf-another").tier == "gold"
    assert not ring.tenant(f"Bearer {KEY}").is_known


def test_a_key_is_revoked_though_the_changed_file_cannot_be_read_at_first(keys_file, ring, caplog, monkeypatch):
    logging.getLogger("ray.serve").propagate = True
    keys_file.write_text(line("tf-another", "gold"))

    def fails(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", fails)
        for _ in range(3):
            assert ring.tenant(f"Bearer {KEY}").tier == "gold"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert not ring.tenant(f"Bearer {KEY}").is_known
    assert ring.tenant("Bearer tf-another").tier == "gold"


@given(st.binary(max_size=200).map(lambda header: header.decode("latin-1")))
def test_no_header_is_somebody_by_chance(header):
    ring = keyring({"gold": Tier(keys=("sha256:" + hashlib.sha256(KEY.encode()).hexdigest(),))})
    assert ring.tenant(header).is_known == (
        header.partition(" ")[2].strip() == KEY and header.lower().startswith("bearer ")
    )


# -- settings ------------------------------------------------------------------------------------------------------


def settings(**values):
    return parse_settings({"model": "m", "served_model_name": "m", **values})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_on_the_loopback_no_key_is_needed(host):
    assert not settings().access_on(host).is_required


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.com"])
def test_elsewhere_a_fleet_without_keys_does_not_start_unless_told(host, keys_file):
    with pytest.raises(SettingsError, match="trifleet keys new"):
        settings().access_on(host)
    assert not settings(access={"required": False}).access_on(host).is_required
    gold = {"gold": {}}
    assert settings(access={"keys_file": str(keys_file)}, tiers=gold).access_on(host).is_required


def test_an_admin_key_is_never_written_into_the_settings():
    with pytest.raises(SettingsError, match=r"access.admin_keys") as caught:
        settings(access={"admin_keys": [ADMIN_KEY]})
    assert ADMIN_KEY not in str(caught.value)


def test_admin_is_no_tier():
    with pytest.raises(SettingsError, match="admin_keys"):
        settings(tiers={"admin": {}})


# -- limits --------------------------------------------------------------------------------------------------------


async def test_a_body_without_a_router_is_checked_by_the_replica():
    engine = Engine()
    async with http(fleet_door(engine, limits=SMALL)) as ask:
        assert (await ask.post("/v1/completions", json={"n": 2})).status_code == 200
        assert (await ask.post("/v1/completions", json={"n": 3})).status_code == 400
        assert (await ask.post("/v1/completions", content=b"[" * 390)).status_code in (200, 400)
    assert engine.bodies[0] == b'{"n":2}'


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_is_taken_at_its_size_and_refused_one_byte_over(chunked):
    async def pieces(size):
        for _ in range(size // 10):
            yield b" " * 10
        yield b" " * (size % 10)

    engine = Engine()
    async with http(fleet_door(engine, limits=SMALL)) as ask:
        for size, status in ((400, 200), (401, 413)):
            content = pieces(size) if chunked else b" " * size
            assert (await ask.post("/v1/completions", content=content)).status_code == status
    assert [len(body) for body in engine.bodies] == [400]


async def test_headers_are_taken_at_their_size_and_refused_one_byte_over():
    async with http(fleet_door(Engine(), limits=SMALL)) as ask:
        named = {"x-request-id": "mine-1"}
        request = ask.build_request("GET", "/v1/models", headers=named)
        room = 512 - sum(len(name) + len(value) for name, value in request.headers.raw)
        for more, status in ((0, 200), (1, 431)):
            headers = {**named, "x-filling": "x" * (room - len("x-filling") + more)}
            assert (await ask.get("/v1/models", headers=headers)).status_code == status


async def test_a_body_that_trickles_in_is_given_up():
    async def trickle():
        while True:
            yield b" "
            await asyncio.sleep(0.05)

    async with http(fleet_door(Engine(), limits=SMALL)) as ask:
        assert (await ask.post("/v1/completions", content=trickle())).status_code == 408


async def test_a_request_ends_in_the_engine_when_its_time_is_over():
    engine = Engine()
    async with http(fleet_door(engine, limits=SMALL)) as ask:
        answer = await ask.post("/detokenize", json={})
        assert answer.status_code == 408
        assert "limits.request_seconds" in answer.json()["error"]["message"]
    assert engine.ended == 1


async def test_a_stream_breaks_off_without_a_clean_end_when_its_time_is_over():
    engine, sent = Engine(), []

    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b""} if not sent else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/messages", "headers": [], "asgi": {"spec_version": "2.3"}}
    await asyncio.wait_for(fleet_door(engine, limits=SMALL)(scope, receive, send), 5)
    await asyncio.sleep(0.05)
    assert engine.ended == 1
    assert sent[0]["status"] == 200
    assert all(message["more_body"] for message in sent[1:])


async def test_a_key_has_so_many_requests_at_once_and_not_one_more(ring):
    engine = Engine()
    door = fleet_door(engine, keys=ring, allowances={"gold": Allowance(concurrent_requests=2)})
    async with http(door) as ask:
        running = [asyncio.create_task(ask.post("/detokenize", json={}, headers=bearer(KEY))) for _ in range(2)]
        await asyncio.sleep(0.05)
        third = await ask.post("/v1/completions", json={}, headers=bearer(KEY))
        assert (third.status_code, third.headers["retry-after"]) == (429, "1")
        assert (await ask.post("/v1/completions", json={})).status_code == 200
        engine.hold.set()
        assert {answer.status_code for answer in await asyncio.gather(*running)} == {200}
        assert (await ask.post("/v1/completions", json={}, headers=bearer(KEY))).status_code == 200
