"""One fleet for all tests of this folder: `trifleet up` in a process of its own, as a person starts it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.haproxy import free_ports

MODEL = "tiny-reasoner"
GOLD_KEY = "tf-a-key-of-gold-0123456789"
MAX_MODEL_LEN = 2048
BLOCKS = 97  # per replica, the null block among them
OTHER_SITE = "http://pages.example"
START_SECONDS = 400
STOP_SECONDS = 60


@dataclass
class RunningFleet:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def samples(self) -> dict[str, float]:
        """`/metrics` now, summed over replicas and all other labels; empty while there is no coordinator."""
        sums: dict[str, float] = {}
        page = httpx.get(f"{self.url}/metrics")
        if page.status_code == 503:
            return sums
        for family in text_string_to_metric_families(page.text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def pool_is_whole(self) -> bool:
        now = self.samples()
        return bool(now) and (
            now["trifleet_free_blocks"] == now["trifleet_total_blocks"]
            and now["trifleet_reservations"] == now["trifleet_reserved_blocks"] == 0
            and now["trifleet_running_requests"] == now["trifleet_waiting_requests"] == 0
        )

    def await_whole_pool(self, seconds: float) -> float:
        """Seconds until every block is back; fails the test if that takes longer than `seconds`."""
        began = time.monotonic()
        while not self.pool_is_whole():
            assert time.monotonic() - began < seconds, f"blocks are still held: {self.samples()}"
            time.sleep(0.02)
        return time.monotonic() - began

    def family(self) -> list[psutil.Process]:
        """Every process of the fleet: `trifleet up`, Ray, Serve, HAProxy, the engines."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self) -> int:
        """Ctrl-C as a terminal sends it, to the whole process group; the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_SECONDS)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("fleet")
    settings = {
        "model": "bundled",
        "served_model_name": MODEL,
        "replicas": 2,
        "cpus_per_replica": 0.5,
        "engine": {
            "max_model_len": MAX_MODEL_LEN,
            "block_size": 32,
            "num_gpu_blocks": BLOCKS,
            "max_num_seqs": 8,
            "extra": {"enforce_eager": True, "allowed_origins": [OTHER_SITE]},
        },
        "compression": {"budget": 128, "interval": 64, "window": 32},
        "coordinator": {"queue_length": 4, "queue_deadline_seconds": 20, "stale_report_seconds": 5, "lease_seconds": 4},
        "tiers": {"gold": {"keys": ["env:GOLD_KEY"], "concurrent_requests": 1}},
        "http": {"port": port},
    }
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump(settings))
    log = folder / "up.log"
    with log.open("wb") as out:
        command = [Path(sys.executable).parent / "trifleet", "up", "-f", str(file)]
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "GOLD_KEY": GOLD_KEY},
        )  # fmt: skip
    running = RunningFleet(process, f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ctrl-C stops it" not in log.read_text():
            assert process.poll() is None, f"trifleet up ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"trifleet up is not ready:\n{log.read_text()}"
            time.sleep(0.5)
        yield running
    finally:
        if process.poll() is None:
            running.stop()


@pytest.fixture
def client(fleet: RunningFleet) -> openai.OpenAI:
    return fleet.client()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """This folder's tests come last, for its fleet stays up until the end and others look for replicas by name; of them
    the one that stops the fleet, before it the one that looks at what is left in the pool, and behind it those that
    start a fleet of their own."""
    here = Path(__file__).parent
    last = [
        "test_after_everything_the_pool_is_whole",
        "test_ctrl_c_stops_the_fleet_and_leaves_no_process",
        "test_a_polite_kill_stops_a_fleet_that_takes_long_to_stop_and_a_second_one_changes_nothing",
        "test_two_minutes_of_mixed_load_lose_nothing_and_nothing_piles_up",
    ]
    items.sort(key=lambda item: (here in item.path.parents, last.index(item.name) if item.name in last else -1))
