"""A real Prometheus for the tests: Debian's package, installed if it may be, on a free port with its own folder."""

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from dashboards.files import RULES
from tests.observability.debian import tool

START_SECONDS = 30.0


class Prometheus:
    """A running server, asked through its HTTP API."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def query(self, expr: str, at: float) -> list[dict[str, Any]]:
        """The series at one moment (Unix time). Raises AssertionError for what Prometheus does not accept."""
        return self._ask("/api/v1/query", {"query": expr, "time": at})

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        return self._ask("/api/v1/query_range", {"query": expr, "start": start, "end": end, "step": step})

    def get(self, path: str) -> Any:
        answer = self._client.get(path).json()
        assert answer["status"] == "success", f"{path}: {answer}"
        return answer["data"]

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False

    def _ask(self, path: str, form: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self._client.post(path, data=form).json()
        assert answer["status"] == "success", f"Prometheus does not run {form['query']}: {answer.get('error')}"
        series: list[dict[str, Any]] = answer["data"]["result"]
        return series


@contextmanager
def running_prometheus(
    metrics_url: str, interval_seconds: int = 1, relabeling: list[dict[str, Any]] | None = None
) -> Iterator[Prometheus]:
    """Scrapes the one address, evaluates our rules, and is gone with its data at the end.

    `relabeling`: Prometheus' metric_relabel_configs.
    """
    address = urlsplit(metrics_url)
    binary = tool("prometheus", "prometheus")
    with tempfile.TemporaryDirectory(prefix="trifleet-prometheus-") as folder:
        config = Path(folder, "prometheus.yml")
        config.write_text(
            yaml.safe_dump(
                {
                    "global": {
                        "scrape_interval": f"{interval_seconds}s",
                        "scrape_timeout": f"{interval_seconds}s",
                        "evaluation_interval": f"{interval_seconds}s",
                    },
                    "rule_files": [str(RULES)],
                    "scrape_configs": [
                        {
                            "job_name": "trifleet",
                            "scheme": address.scheme,
                            "metrics_path": address.path,
                            "metric_relabel_configs": relabeling or [],
                            "static_configs": [{"targets": [address.netloc], "labels": {"cluster": "local"}}],
                        }
                    ],
                }
            )
        )
        port = free_port()
        log = Path(folder, "prometheus.log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    binary,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--log.level=warn",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + START_SECONDS
            while not prometheus.is_ready():
                running = process.poll() is None and time.monotonic() < deadline
                assert running, f"Prometheus did not start: {log.read_text()}"
                time.sleep(0.1)
            yield prometheus
        finally:
            process.terminate()
            process.wait(timeout=START_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
