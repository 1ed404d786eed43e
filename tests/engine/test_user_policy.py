"""An engine as a user starts it, in processes of its own: a policy of another package, statistics: self.

Two tensor-parallel workers, so the engine core and both ranks are processes that never saw the test's imports.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import BLOCK
from triattention.calibration import SHIPPED_TEXT, calibrate
from triattention.statistics import QueryStatistics

POLICY = '''
import os
from pathlib import Path

from triattention.policies import TriAttention, register


@register("theirs")
class Theirs(TriAttention):
    """As TriAttention; leaves a note of where it runs and with which statistics."""

    def __init__(self, config, context):
        super().__init__(config, context)
        note = Path(os.environ["NOTES"]) / f"{os.getpid()}"
        note.write_text(f"{config.statistics} {list(context.kv_heads)}")
'''
ENGINE = """
import json, os, sys
from vllm import LLM, SamplingParams
from triattention.config import CompressionConfig
from triattention.vllm import engine_arguments

if __name__ == "__main__":
    config = CompressionConfig(budget=64, interval=64, window=16, policy="theirs", statistics="self")
    arguments = engine_arguments(config)
    arguments["additional_config"]["triattention_reports"] = False
    llm = LLM(
        sys.argv[1], tensor_parallel_size=2, dtype="float32", max_model_len=1024, block_size=int(sys.argv[2]),
        num_gpu_blocks_override=64, kv_cache_memory_bytes=1 << 27, enforce_eager=True, max_num_seqs=2,
        skip_tokenizer_init=True, **arguments,
    )
    sampling = SamplingParams(temperature=0, max_tokens=170, ignore_eos=True, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": [3, 1, 4, 1, 5]}], sampling, use_tqdm=False)
    print("TOKENS", json.dumps(list(output.outputs[0].token_ids)))
"""


def installed_package(folder: Path) -> Path:
    """A package as pip leaves it: a module, and metadata with the entry point."""
    (folder / "their_policies.py").write_text(POLICY)
    metadata = folder / "their_policies-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-policies\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[triattention.policies]\ntheirs = their_policies\n")
    return folder


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("engine")
    for name in ("notes", "site", "cache"):
        (folder / name).mkdir()
    (folder / "engine.py").write_text(ENGINE)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(installed_package(folder / "site")), *sys.path]),
        "NOTES": str(folder / "notes"),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    command = [sys.executable, str(folder / "engine.py"), str(tiny_model), str(BLOCK)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False), folder


def test_every_worker_finds_a_policy_that_an_installed_package_registers(
    run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = run
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    notes = [note.read_text().split(maxsplit=1) for note in (folder / "notes").iterdir()]
    assert sorted(heads for _, heads in notes) == ["[0]", "[1]"]
    tokens = json.loads(done.stdout.split("TOKENS ")[1].splitlines()[0])
    assert len(tokens) == 170


def test_ranks_share_the_statistics_that_one_of_them_measured_and_the_log_says_so(
    run: tuple[subprocess.CompletedProcess[str], Path], tiny_model: Path
) -> None:
    done, folder = run
    assert len({note.read_text().split()[0] for note in (folder / "notes").iterdir()}) == 1
    [file] = (folder / "cache" / "triattention").glob("*.safetensors")
    log = done.stdout + done.stderr
    assert log.count("statistics is self: measuring the queries of") == 1
    assert log.count("statistics is self: measured over") == 1
    assert log.count("statistics is self: using those") == 1

    from transformers import AutoConfig

    measured = QueryStatistics.load(file, AutoConfig.from_pretrained(tiny_model))
    expected = calibrate(tiny_model, SHIPPED_TEXT, None)
    torch.testing.assert_close(measured.query_mean, expected.query_mean, atol=1e-5, rtol=1e-5)
