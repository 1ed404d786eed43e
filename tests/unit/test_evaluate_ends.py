"""`trifleet evaluate` ends when it is told to, and no process of it is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

COMMAND = "tests.unit.sleeping_evaluate evaluate --task needle --instances 1 --policy random --budget 128 --budget 256"


def _workers(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if any("spawn_main" in word for word in child.cmdline())]


@pytest.mark.parametrize(
    ("after", "end", "code", "sentence"),
    [
        (0.0, lambda pid: os.killpg(pid, signal.SIGINT), 130, ""),
        (6.0, lambda pid: os.kill(pid, signal.SIGTERM), 130, ""),
        (6.0, lambda pid: os.kill(pid, signal.SIGKILL), -signal.SIGKILL, ""),
        (0.0, lambda pid: _workers(pid)[0].kill(), 1, "was killed, most likely for memory: lower --engines (2 now)"),
        (0.0, lambda pid: _workers(pid)[0].send_signal(signal.SIGABRT), 1, "ended of itself with code -6"),
    ],
    ids=["Ctrl-C while engines start", "a polite kill", "a hard kill", "an engine out of memory", "an engine's crash"],
)
def test_evaluate_ends_with_all_its_processes(
    after: float, end: Callable[[int], None], code: int, sentence: str
) -> None:
    evaluate = subprocess.Popen(
        [sys.executable, "-m", *COMMAND.split(), "--engines", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(workers := _workers(evaluate.pid)) < 2:
            assert evaluate.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(after)
        end(evaluate.pid)
        said, _ = evaluate.communicate(timeout=30)
        assert psutil.wait_procs(workers, timeout=15)[1] == []
        assert evaluate.returncode == code
        assert "Traceback" not in said
        assert sentence in " ".join(said.split())
    finally:
        evaluate.kill()
        for worker in workers:
            if worker.is_running():
                worker.kill()
