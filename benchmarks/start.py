"""From where `trifleet up` reads its settings to the first answer, and what takes the time: `trifleet bench start`."""

import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine
from deploy.fleet import running_fleet
from deploy.keys import key_header
from deploy.settings import load_settings


def bench_start(settings_file: Path) -> dict[str, Any]:
    """Seconds of each part, in order, and altogether. One start: its spread is what several runs show."""
    about = machine("vllm", "ray", "torch")
    settings = load_settings(settings_file)
    began = last = time.monotonic()
    parts: dict[str, float] = {}
    current = "settings"

    def progress(part: str) -> None:
        nonlocal current, last
        if part != current:
            now = time.monotonic()
            parts[current] = parts.get(current, 0.0) + now - last
            current, last = part, now

    with running_fleet(settings, progress) as url:
        progress("first answer")
        body = {"model": settings.served_model_name, "prompt": "1 2 3", "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, timeout=120, headers=key_header()).raise_for_status()
        progress("done")
        seconds = time.monotonic() - began
    parts.pop("done", None)  # the stop
    parts.pop("stopping", None)
    return about | {"replicas": settings.replicas, "seconds": seconds, "parts": parts}
