"""An engine's process ends with the one that started it, also when that is killed: it would keep the memory that the
next one needs."""

import subprocess
import sys

import psutil

START = """
import time
import bundled
from triattention.vllm import engine_arguments
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

engine = AsyncLLM.from_engine_args(
    AsyncEngineArgs(
        model=str(bundled.MODEL), max_model_len=256, num_gpu_blocks_override=32, kv_cache_memory_bytes=1 << 22,
        enforce_eager=True, disable_log_stats=True, **engine_arguments(None),
    )
)
print("up", flush=True)
time.sleep(600)
"""


def test_a_killed_parent_leaves_no_engine() -> None:
    parent = subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, text=True)
    family: list[psutil.Process] = []
    try:
        assert parent.stdout is not None
        assert "up\n" in iter(parent.stdout.readline, "")
        family = psutil.Process(parent.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(process.cmdline()) for process in family)
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
    finally:
        for process in (*family, parent):
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()
