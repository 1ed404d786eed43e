"""The GPU's code path in a real engine, its Triton kernels interpreted on the CPU (`interpreted_engine` says what is
real), token by token against the dense reference. No test here runs on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from tests.engine.conftest import SIZES, save_statistics, save_tiny_model
from tests.engine.reference import DenseReference
from triattention.config import CompressionConfig, Selection

BLOCK = 16
TOKENS = 80


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("small")
    model = save_tiny_model(Qwen3Config(**SIZES | {"num_hidden_layers": 2}), folder / "model")
    return model, save_statistics(model, folder / "statistics.safetensors")


@pytest.mark.parametrize(
    ("runner", "asynchronous", "selection", "requests"),
    [("V1", False, "per_head", 1), ("V2", True, "per_layer_per_head", 2)],
    ids=["V1 runner, sync", "V2 runner, async, two requests"],
)
def test_greedy_tokens_equal_the_reference(
    small_model: tuple[Path, Path],
    prompts: list[list[int]],
    tmp_path: Path,
    runner: str,
    asynchronous: bool,
    selection: Selection,
    requests: int,
) -> None:
    model, statistics = small_model
    config = CompressionConfig(budget=32, interval=16, window=8, selection=selection, statistics=statistics)
    prompts = [prompts[0], prompts[1][:10]][:requests]
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps(
            {
                "model": str(model), "block_size": BLOCK, "prompts": prompts, "tokens": TOKENS,
                "asynchronous": asynchronous, "warm_up": runner == "V2",
                "compression": config.model_dump(mode="json"),
            }
        )
    )  # fmt: skip
    environment = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))}
    child = subprocess.run(
        [sys.executable, "-m", "tests.engine.interpreted_engine", str(job)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    result: dict[str, Any] = json.loads(job.with_suffix(".result").read_text())

    reference = DenseReference(model, statistics)
    compactions = 0
    for prompt, tokens in zip(prompts, result["tokens"], strict=True):
        expected, times = reference.generate(prompt, TOKENS, config, BLOCK, int(asynchronous))
        assert times >= 2
        assert tokens == expected
        compactions += times
    assert result["compactions"] == result["timed"] == compactions
    assert result["free_blocks"] == result["total_blocks"]
    assert result["builder"] == "CompactedTritonMetadataBuilder"
    assert result["block_tables"] == f"{runner}BlockTables"
    assert result["warmed_up"] == ["compact", "plan", "score", "squeeze"], "a step would stop to compile the others"
    assert result["addresses"] == 1, "a captured CUDA graph would read an old block table"
