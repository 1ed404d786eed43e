"""The real HAProxy with the configuration that Ray writes and our wrapper adjusts, before scripted replicas.

Which replica fails, and when, is scripted here, so that each way to fail is seen alone.
"""

import asyncio
import base64
import contextlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import deploy.haproxy
from deploy import haproxy_wrapper
from deploy.haproxy import free_ports
from deploy.haproxy_wrapper import ASKED
from deploy.settings import FleetSettings
from replicas.headers import PREFIX, RESERVATION, TIER, WAITED
from replicas.limits import BODY_BYTES

# In a process of its own, because Ray reads the variables when it is imported.
WRITE_CONFIG = """
import json, sys
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
port, router, replicas, fallback = json.loads(sys.argv[1])
backends = {}
if replicas or fallback:
    backends["app"] = BackendConfig(
        name="app", app_name="app", path_prefix="/",
        servers=[ServerConfig(name, "127.0.0.1", at, replica_id=name) for name, at in replicas.items()],
        ingress_request_router_servers=[ServerConfig("router", "127.0.0.1", router)] if router else [],
        fallback_server=ServerConfig("SERVE_PROXY", "127.0.0.1", fallback) if fallback else None,
    )
config = HAProxyConfig(http_options=HTTPOptions(host="127.0.0.1", port=port), metrics_enabled=False, is_head=True)
api = HAProxyApi(config, backends)
config.has_received_routes = config.has_received_servers = True
api._generate_config_file_internal()
print(api.config_file_path)
"""


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return head[0], headers, await reader.readexactly(int(headers.get("content-length", 0)))


def response(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


@dataclass
class Replica:
    """`fails`: how its requests end; None for an answer with its name."""

    name: str
    fails: str | None = None
    seen: list[dict[str, str]] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, headers, body = await read_request(reader)
        if "healthz" in line:
            writer.write(response(b"ok"))
        else:
            self.seen.append(headers)
            if not self.fails:
                writer.write(response(self.name.encode() + b":" + body))
            elif self.fails == "says 502":
                writer.write(response(b"dead engine", "502 Bad Gateway"))
            elif self.fails == "in the middle":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        writer.close()


@dataclass
class Router:
    """Names the replicas in turn."""

    turns: list[str]
    asked: list[dict[str, str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Of the bodies that it was shown."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, headers, body = await read_request(reader)
        self.asked.append(headers)
        self.sizes.append(len(body))
        number = len(self.asked)
        own = {RESERVATION: f"rsv{number}", WAITED: "1.500"}
        answer = {"replica_id": self.turns[number - 1], "request_headers": own}
        is_broken = self.turns[number - 1] == "broken"
        writer.write(response(json.dumps(answer).encode(), "500 Internal Server Error" if is_broken else "200 OK"))
        await writer.drain()
        writer.close()


@dataclass
class Setup:
    url: str
    router: Router
    router_server: asyncio.Server
    router_port: int
    replicas: dict[str, Replica]
    ports: dict[str, int]
    fallback: Replica

    def script(self, turns: list[str], **fails: str) -> None:
        """Forget what was; the router names these replicas, and those named fail in that way."""
        self.router.turns, self.router.asked, self.router.sizes = turns, [], []
        self.fallback.seen = []
        for name, replica in self.replicas.items():
            replica.fails, replica.seen = fails.get(name), []

    async def post(self, headers: dict[str, str] | dict[bytes, bytes] | None = None) -> httpx.Response:
        async with httpx.AsyncClient(timeout=10) as http:
            return await http.post(f"{self.url}/v1/completions", content=b"the prompt", headers=headers)


@contextlib.asynccontextmanager
async def haproxy(
    folder: Path,
    router_port: int | None,
    replica_ports: dict[str, int],
    router_seconds: int | None = None,
    fallback_port: int | None = None,
) -> AsyncIterator[str]:
    """Its URL, once it is there. Without replicas and a fallback it knows of no application.

    `router_seconds`: how long the router may take for an answer, if not as long as in a fleet. `fallback_port`: of
    Serve's own proxy on the head.
    """
    (port,) = free_ports(1)
    settings = FleetSettings(served_model_name="m")
    variables = {**os.environ, **deploy.haproxy.environment(settings), **deploy.haproxy.private(folder, port)}
    if router_seconds is not None:
        variables["RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S"] = str(router_seconds)
    arguments = json.dumps([port, router_port, replica_ports, fallback_port])
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITE_CONFIG, arguments, env=variables, stdout=asyncio.subprocess.PIPE
    )
    config = (await writer.communicate())[0].decode().split()[-1]
    binary = variables["RAY_SERVE_HAPROXY_BINARY_PATH"]
    process = await asyncio.create_subprocess_exec(binary, "-db", "-f", config, env=variables)
    try:
        async with httpx.AsyncClient() as http:
            while True:
                await asyncio.sleep(0.1)
                assert process.returncode is None, "HAProxy did not start: its words are above"
                with contextlib.suppress(httpx.ConnectError):
                    status = (await http.get(f"http://127.0.0.1:{port}/-/healthz")).status_code
                    if status == 200 or not replica_ports:
                        break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


@pytest.fixture(scope="module")
async def setup(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    folder = tmp_path_factory.mktemp("haproxy")
    replicas = {name: Replica(name) for name in "abc"}
    router = Router([])
    async with AsyncExitStack() as stack:

        async def serve(handler: Callable[..., Any]) -> asyncio.Server:
            return await stack.enter_async_context(await asyncio.start_server(handler, "127.0.0.1", 0))

        async def port_of(handler: Callable[..., Any]) -> int:
            port: int = (await serve(handler)).sockets[0].getsockname()[1]
            return port

        ports = {name: await port_of(replica) for name, replica in replicas.items()}
        (ports["gone"],) = free_ports(1)
        fallback = Replica("fallback")
        router_server = await serve(router)
        router_port = router_server.sockets[0].getsockname()[1]
        running = haproxy(folder, router_port, ports, fallback_port=await port_of(fallback))
        url = await stack.enter_async_context(running)
        yield Setup(url, router, router_server, router_port, replicas, ports, fallback)


@pytest.fixture(scope="module")
async def without_router(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    """The same replicas before a HAProxy that knows of no router, as while Serve replaces one."""
    async with haproxy(tmp_path_factory.mktemp("alone"), None, setup.ports) as url:
        yield replace(setup, url=url)


@pytest.mark.parametrize(("failing", "way"), [("a", "closes"), ("gone", ""), ("a", "says 502")])
async def test_a_replica_that_fails_before_its_first_byte_is_replaced_by_another_that_the_router_names(
    setup: Setup, failing: str, way: str
) -> None:
    setup.script([failing, "c"], a=way)
    answer = await setup.post()
    assert (answer.status_code, answer.text) == (200, "c:the prompt")
    assert setup.replicas["b"].seen == []
    first, second = setup.router.asked
    assert not first["x-request-id"].startswith("again:")
    assert second["x-request-id"] == "again:rsv1:1.500"
    assert setup.replicas["c"].seen[0][RESERVATION] == "rsv2"


async def test_a_second_failure_is_not_retried_and_the_client_gets_a_sentence(setup: Setup) -> None:
    setup.script(["a", "b", "c"], a="closes", b="closes")
    answer = await setup.post()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "send it again" in answer.json()["error"]["message"]
    assert setup.replicas["c"].seen == []


async def test_a_router_that_fails_is_told_from_a_full_fleet_and_the_client_gets_a_sentence(setup: Setup) -> None:
    setup.script(["broken"])
    answer = await setup.post()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "send it again" in answer.json()["error"]["message"]
    assert answer.headers["x-serve-reason"]


async def test_a_replica_that_dies_in_the_middle_leaves_a_broken_transfer_and_is_not_replayed(setup: Setup) -> None:
    setup.script(["a", "b"], a="in the middle")
    with pytest.raises(httpx.RemoteProtocolError):
        await setup.post()
    assert setup.replicas["b"].seen == []


async def test_clients_cannot_pretend_to_come_back(setup: Setup) -> None:
    setup.script(["a", "b"], a="closes")
    answer = await setup.post({"x-request-id": "again:rsv0", "x-trifleet-again": "1", RESERVATION: "rsv0"})
    assert answer.text == "b:the prompt"
    assert setup.router.asked[0]["x-request-id"] != "again:rsv0"
    assert setup.router.asked[1]["x-request-id"] == "again:rsv1:1.500"


async def test_the_router_is_told_the_path_and_the_api_key_whatever_its_bytes(setup: Setup) -> None:
    setup.script(["a", "b", "c"], a="closes")
    await setup.post({b"authorization": b"Bearer secret, with a comma, \xe9 and \xc3\xa9", ASKED.encode(): b"/forged"})
    await setup.post()
    with_key, again, without = (asked[ASKED] for asked in setup.router.asked)
    path, _, encoded = with_key.partition(" ")
    assert (again, path) == (with_key, "/v1/completions")
    assert base64.b64decode(encoded) == b"Bearer secret, with a comma, \xe9 and \xc3\xa9"
    assert without.strip() == "/v1/completions"
    assert ASKED not in setup.replicas["c"].seen[0]


async def test_a_clients_request_id_is_kept_unless_it_has_bytes_that_serve_cannot_read(setup: Setup) -> None:
    setup.script(["a", "a"])
    await setup.post({b"x-request-id": b"mine: number 1"})
    await setup.post({b"x-request-id": b"caf\xe9"})
    kept, given = setup.replicas["a"].seen
    assert kept["x-request-id"] == "mine: number 1"
    assert len(given["x-request-id"]) == len(str(uuid.uuid4()))
    assert [asked["x-request-id"] for asked in setup.router.asked] == [kept["x-request-id"], given["x-request-id"]]


async def test_of_a_body_that_is_too_large_the_router_sees_that_it_is(setup: Setup) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 50_000

    setup.script(["a", "a"])
    most = b" " * BODY_BYTES
    filling = {"x-filling": "x" * 15_000, "authorization": "x" * 900}
    async with httpx.AsyncClient(timeout=10) as http:
        await http.post(f"{setup.url}/v1/completions", content=most, headers=filling)
        await http.post(f"{setup.url}/v1/completions", content=pieces(), headers=filling)
    assert setup.router.sizes[0] == BODY_BYTES
    assert setup.router.sizes[1] > BODY_BYTES


async def test_how_serve_handles_a_request_is_not_the_clients_to_say(setup: Setup) -> None:
    """Serve would give it up after that time, or let it run on when the client has left."""
    setup.script(["a"])
    named = {"x-request-timeout-seconds": "1", "x-request-disconnect-disabled": "?1"}
    assert (await setup.post(named)).status_code == 200
    assert not named.keys() & setup.replicas["a"].seen[0].keys()


@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS"])
async def test_no_client_sets_the_routers_headers_router_or_none(
    setup: Setup, without_router: Setup, method: str
) -> None:
    setup.script(["a"])
    forged = {RESERVATION: "rsv0", TIER: "gold", "x-serve-router-new": "x"}
    async with httpx.AsyncClient(timeout=10) as http:
        for way in (setup, without_router):
            assert (await http.request(method, f"{way.url}/v1/models", headers=forged)).status_code == 200
    seen = [headers for replica in setup.replicas.values() for headers in replica.seen]
    assert len(seen) == 2
    for headers in seen:
        assert not [name for name in headers if name.startswith(PREFIX) and headers[name] in forged.values()]


@pytest.mark.parametrize(
    ("headers", "later", "status"),
    [(b"transfer-encoding: chunked", b"no chunk\r\n", 400), (b"content-length: 2", b"{", 408)],
)
async def test_what_haproxy_itself_says_of_a_body_has_openais_shape(
    setup: Setup, tmp_path: Path, headers: bytes, later: bytes, status: int
) -> None:
    async with haproxy(tmp_path, 1, setup.ports, router_seconds=1) as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n\r\n")
        await asyncio.sleep(0.2)
        writer.write(later)
        line, answered, body = await asyncio.wait_for(read_request(reader), 10)
        writer.close()
    assert line.split()[1] == str(status)
    assert answered["content-type"] == "application/json"
    assert json.loads(body)["error"]["code"] == status


@pytest.fixture
def a_second_for_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = tmp_path / "wrapper.py"
    text = Path(haproxy_wrapper.__file__).read_text()
    impatient.write_text(text.replace(f"HEAD_SECONDS = {haproxy_wrapper.HEAD_SECONDS}", "HEAD_SECONDS = 1"))
    monkeypatch.setattr(haproxy_wrapper, "__file__", str(impatient))


@pytest.mark.usefixtures("a_second_for_the_head")
async def test_who_sends_no_whole_head_in_time_is_cut_off_and_a_slow_body_is_not(setup: Setup, tmp_path: Path) -> None:
    """Such a connection would keep a HAProxy that ends alive, and with it its pod."""
    setup.script(["a"])

    async def answered(url: str, *pieces: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(1.5)
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return answer

    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    async with haproxy(tmp_path, setup.router_port, setup.ports) as url:
        silent, half, slow = await asyncio.gather(
            answered(url), answered(url, head), answered(url, head + b"content-length: 4\r\n\r\n", b"slow")
        )
    assert silent == b""
    assert half.split()[1] == b"408"
    assert slow.endswith(b"a:slow")


async def test_while_no_router_can_be_reached_requests_flow(setup: Setup) -> None:
    setup.script([])
    setup.router_server.close()
    answer = await setup.post()
    assert answer.text.endswith(":the prompt")


async def test_while_it_knows_of_no_application_the_client_is_told_to_come_back(tmp_path: Path) -> None:
    """As right after HAProxy was started anew, before Serve has told it of the replicas."""
    async with haproxy(tmp_path, None, {}) as url, httpx.AsyncClient() as http:
        answer = await http.post(f"{url}/v1/completions", content=b"the prompt")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "send it again" in answer.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_before_the_first_replica_is_there_nobody_is_held_and_haproxy_is_not_ready(
    tmp_path: Path, method: str
) -> None:
    """As while the engines load, for minutes: Serve's own proxy would hold every request, and then send all of them to
    the first replica, unbooked."""
    fallback = Replica("fallback")
    async with await asyncio.start_server(fallback, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with haproxy(tmp_path, None, {}, fallback_port=port) as url, httpx.AsyncClient() as http:
            answer = await http.request(method, f"{url}/v1/completions")
            ready = await http.get(f"{url}/-/healthz")
    assert (answer.status_code, answer.headers["retry-after"], ready.status_code) == (503, "1", 503)
    assert fallback.seen == []
