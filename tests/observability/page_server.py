"""The fake fleet's pages, answered by the gate that the replicas use, on a free loopback port."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from deploy.exposition import as_json
from replicas.fleet_page import fleet_page
from replicas.gate import Gate, Page
from tests.observability.fake_fleet import MODEL, FakeFleet
from tests.observability.prometheus import free_port


class NoReservations:
    def begin(self, reservation: str) -> None:
        raise AssertionError("a page is no request")

    finish = begin


class PageServer:
    """`fleet` may be exchanged, and `is_up` taken away, while a browser watches."""

    def __init__(self) -> None:
        self.fleet = FakeFleet()
        self.is_up = True
        self.url = ""

    async def render(self) -> bytes:
        if not self.is_up:
            raise ConnectionError("the coordinator is away")
        return as_json(self.fleet.snapshot(), MODEL)


@contextmanager
def running_pages() -> Iterator[PageServer]:
    pages = PageServer()
    gate = Gate(Starlette(), NoReservations(), {"/fleet": Page("application/json", pages.render, fleet_page)})
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(gate, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    pages.url = f"http://127.0.0.1:{port}/fleet"
    try:
        yield pages
    finally:
        server.should_exit = True
        thread.join()
