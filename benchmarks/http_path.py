"""What the fleet's HTTP path costs: vLLM's own server against one replica behind the fleet's endpoint, with the same
engine arguments, both up at once and taking turns: `trifleet bench http`. The replica is asked at its own port as
well, so that what HAProxy, router and coordinator add is told from what the replica does.

The load generator is one asyncio loop over raw server-sent events, which costs both sides the same core.
"""

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np

import bundled
from benchmarks.environment import engine_environment
from benchmarks.machine import machine
from deploy.fleet import FleetError, running_fleet
from deploy.haproxy import free_ports
from deploy.keys import key_header
from deploy.settings import FleetSettings, load_settings
from triattention.vllm import engine_arguments, on_this_machine

STREAMS, STREAM_TOKENS = 16, 600
SINGLE_TOKENS = 4
FIRST_SEED = {"vllm": 0, "fleet": 0, "replica": 50_000}
"""The same prompts for the two that are compared; others for the engine that is asked in two ways and caches them."""
START_SECONDS = 300.0

_LOG_PREFIX = re.compile(r"\(\w+ pid=\d+\) ERROR [^\]]*\] ")
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception)(: |$)")


def bench_http(settings_file: Path, rounds: int = 7, singles: int = 60) -> dict[str, Any]:
    """The figures of the command. `rounds` of STREAMS streams a side, and `singles` lone requests a side."""
    about = machine("vllm", "ray", "torch")
    settings = load_settings(settings_file).model_copy(update={"replicas": 1})
    with _vllm_server(settings) as vllm, running_fleet(settings) as fleet:
        urls = {"vllm": vllm, "replica": _behind_haproxy(settings.http.host), "fleet": fleet}
        return about | asyncio.run(_compare(urls, settings, rounds, singles))


def _behind_haproxy(host: str) -> str:
    """Where HAProxy sends what goes to the only replica."""
    import ray
    from ray.serve.context import _get_global_client

    controller = _get_global_client()._controller
    (group,) = ray.get(controller.get_target_groups.remote(from_proxy_manager=True))
    (replica,) = group.targets
    return f"http://{host}:{replica.port}"


async def _compare(urls: dict[str, str], settings: FleetSettings, rounds: int, singles: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {name: [] for name in urls}
    under_load: dict[str, list[float]] = {name: [] for name in urls}
    between: dict[str, list[float]] = {name: [] for name in urls}
    alone: dict[str, list[float]] = {name: [] for name in urls}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits, headers=key_header()) as client:
        for turn in range(-1, rounds):  # the first round of each side is not counted
            for name in _turn(urls, turn):
                bodies = [_body(settings, FIRST_SEED[name] + turn * STREAMS + i, STREAM_TOKENS) for i in range(STREAMS)]
                began = time.perf_counter()
                streams = await asyncio.gather(*(_stream(client, urls[name], body) for body in bodies))
                if turn >= 0:
                    speeds[name].append(STREAMS * STREAM_TOKENS / (time.perf_counter() - began))
                    under_load[name] += [first for first, _ in streams]
                    between[name] += [wait for _, waits in streams for wait in waits]
        for turn in range(-2, singles):
            for name in _turn(urls, turn):
                body = _body(settings, FIRST_SEED[name] + 10_000 + turn, SINGLE_TOKENS)
                first, _ = await _stream(client, urls[name], body)
                if turn >= 0:
                    alone[name].append(first)
    ratios = [ours / theirs for ours, theirs in zip(speeds["fleet"], speeds["vllm"], strict=True)]
    low, high = np.quantile(ratios, [0.25, 0.75])
    added = [ours - theirs for ours, theirs in zip(alone["fleet"], alone["vllm"], strict=True)]
    return {
        "streams": STREAMS,
        "tokens_per_stream": STREAM_TOKENS,
        "rounds": rounds,
        "ratio_tokens_per_second": statistics.median(ratios),
        "ratio_tokens_per_second_quartiles": [float(low), float(high)],
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ttft_ms_p50_under_load": {name: 1000 * statistics.median(values) for name, values in under_load.items()},
        "between_chunks_ms_p50": {name: 1000 * statistics.median(values) for name, values in between.items()},
        "between_chunks_ms_p99": {name: 1000 * float(np.quantile(values, 0.99)) for name, values in between.items()},
        "ttft_ms_p50": {name: 1000 * statistics.median(values) for name, values in alone.items()},
        "added_ttft_ms_p50": 1000 * statistics.median(added),
        "added_ttft_ms_p90": 1000 * float(np.quantile(added, 0.9)),
    }


def _turn(urls: dict[str, str], number: int) -> list[str]:
    """Who goes first changes every turn."""
    return list(urls) if number % 2 == 0 else list(reversed(urls))


def _body(settings: FleetSettings, seed: int, tokens: int) -> dict[str, Any]:
    return {
        "model": settings.served_model_name,
        "messages": [{"role": "user", "content": bundled.demo_prompt(seed, 1800)}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds to the first chunk of a stream that is read to its end, and from each chunk to the next; a chunk is what
    one read gives. Raises if it did not end as asked."""
    waits, last, before = [], b"", time.perf_counter()
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            now = time.perf_counter()
            waits.append(now - before)
            before, last = now, (last + chunk)[-2000:]
    usage = json.loads(last.rsplit(b"data: ", 2)[-2])["usage"]
    if usage["completion_tokens"] != body["max_tokens"]:
        raise RuntimeError(f"a stream of {url} ended early: {last.decode(errors='replace')}")
    return waits[0], waits[1:]


def flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments of vLLM's engine as its command line takes them."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(_word(one) for one in (value if isinstance(value, list) else [value]))]
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


@contextmanager
def _vllm_server(settings: FleetSettings) -> Iterator[str]:
    """vLLM's own API server with the engine arguments of a replica."""
    (port,) = free_ports(1)
    arguments = on_this_machine(settings.engine_arguments()) | engine_arguments(settings.compression)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += [*flags(arguments), "--disable-log-stats", "--disable-uvicorn-access-log"]
    environment = os.environ | engine_environment() | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _await_health(url, server, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)  # its engine with it


def _await_health(url: str, server: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            reasons = _reasons(log.read().decode(errors="replace"))
            raise FleetError(f"vLLM's own server did not start (exit code {server.returncode}):\n{reasons}")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise FleetError(f"vLLM's own server was not ready after {START_SECONDS:.0f} s.")


def _reasons(log: str) -> str:
    """What the exceptions in the log say, each once and without its frames; the last lines where there are none."""
    lines = [_LOG_PREFIX.sub("", line) for line in log.splitlines() if line.strip()]
    said: list[str] = []
    is_exception = False
    for line in lines:
        is_exception = _EXCEPTION.match(line) is not None or (is_exception and line.startswith("  "))
        if is_exception and not line.startswith("    "):
            said.append(line)
    return "\n".join(dict.fromkeys(said or lines[-10:]))
