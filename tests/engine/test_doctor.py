"""`trifleet doctor` as a user types it: findings, exit code and JSON, from the engine's own checks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config
from typer.testing import CliRunner

from deploy.cli import app
from tests.engine.conftest import SIZES, save_tiny_model
from tests.engine.test_refusals import save_mla_model, vllm_config
from tests.engine.test_support_matrix import HYBRID
from tests.unit.tiny_models import random_statistics
from triattention.rope import read_config
from triattention.vllm.self_calibration import statistics_path

FLEET = """
model: {model}
served_model_name: tiny
engine: {{dtype: bfloat16, max_model_len: 2048, block_size: 32, num_gpu_blocks: 100, max_num_batched_tokens: 256,
  extra: {{gpu_memory_utilization: 0.05}}}}
compression: {{budget: 256, interval: 128, window: 64, statistics: {statistics}}}
"""


V2_RUNNER = """
from types import SimpleNamespace
from tests.engine.interpreted_engine import FakeActiveDriver
from triton.backends import backends
backends["cpu"] = SimpleNamespace(driver=FakeActiveDriver)
"""
"""As on a GPU: vLLM's V2 model runner asks for Triton, which the interpreter stands in for."""


def doctor(folder: Path, *options: str, before: str = "") -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and JSON of the command in a process of its own, for it starts a worker."""
    command = [
        sys.executable,
        "-c",
        f"{before}\nfrom deploy.cli import app; app()",
        "doctor",
        *options,
        "--json",
        str(folder / "doctor.json"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (folder / "doctor.json").exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads((folder / "doctor.json").read_text())


def findings(figures: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {finding["subject"]: (finding["verdict"], finding["sentence"]) for finding in figures["findings"]}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(Gemma2Config(**SIZES | HYBRID), tmp_path_factory.mktemp("hybrid") / "model")


def test_a_model_that_is_served_and_why(hybrid: Path, tmp_path: Path) -> None:
    random_statistics(read_config(hybrid)).save(tmp_path / "statistics")
    (tmp_path / "fleet.yaml").write_text(FLEET.format(model=hybrid, statistics=tmp_path / "statistics"))
    code, output, figures = doctor(tmp_path, "-f", str(tmp_path / "fleet.yaml"), "--prompt-tokens", "100")
    assert code == 0, output
    assert f"{hybrid}: would be served with compression" in output
    found = findings(figures)
    assert {verdict for verdict, _ in found.values()} == {"fine"}
    assert found["layers"][1] == "2 left alone, sliding window of 64 tokens (0, 2); 2 compressed (1, 3)"
    assert found["RoPE"][1] == "half-split (neox) pairs, 32 of 32 numbers rotated"
    assert "CPU_ATTN, V1 model runner" in found["KV cache"][1]
    numbers = figures["figures"]
    assert numbers["pool_blocks"] == 99
    # 4 pinned blocks, and 256 + 127 + 1 in flight: 12 more; both kinds of layers share the pool.
    sliding = numbers["blocks_without_compression"] - 2048 // 32
    assert numbers["blocks_bound"] == 16 + sliding
    assert numbers["requests_at_once"] == 99 // numbers["blocks_bound"]


def test_a_model_is_served_by_the_model_runner_of_gpus_too(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    extra = "gpu_memory_utilization: 0.05, enable_lora: true"
    code, output, figures = doctor(tmp_path, "-f", fleet_with(extra, tmp_path, tiny_model), before=V2_RUNNER)
    assert code == 0, output
    assert "CPU_ATTN, V2 model runner" in findings(figures)["KV cache"][1]


def fleet_with(extra: str, folder: Path, model: Path) -> str:
    settings = FLEET.format(model=model, statistics="self")
    (folder / "fleet.yaml").write_text(settings.replace("gpu_memory_utilization: 0.05", extra))
    return str(folder / "fleet.yaml")


def test_arguments_of_vllms_front_end_do_not_refuse_a_fleet(tiny_model: Path, tmp_path: Path) -> None:
    extra = "allowed_origins: [https://chat.example], enable_auto_tool_choice: true, tool_call_parser: hermes"
    code, output, _ = doctor(tmp_path, "-f", fleet_with(extra, tmp_path, tiny_model))
    assert code == 0, output


def test_an_argument_that_vllm_has_not_is_named_as_the_replica_names_it(tiny_model: Path, tmp_path: Path) -> None:
    code, _, figures = doctor(tmp_path, "-f", fleet_with("allowed_origin: [x]", tmp_path, tiny_model))
    assert code == 1
    sentence = "vLLM has no argument allowed_origin: correct engine.extra in the settings"
    assert findings(figures) == {"settings": ("refused", sentence)}


def test_statistics_that_the_engine_measured_before_are_checked(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    file = statistics_path(vllm_config(tiny_model, max_model_len=2048, dtype="bfloat16").model_config)
    file.parent.mkdir(parents=True)
    file.write_text("damaged")
    code, _, figures = doctor(tmp_path, "-f", fleet_with("gpu_memory_utilization: 0.05", tmp_path, tiny_model))
    assert code == 1
    verdict, sentence = findings(figures)["policy"]
    assert verdict == "refused"
    assert sentence.startswith(f"{file} is not a file of query statistics")


def test_statistics_that_are_missing_are_told_once_and_the_rest_is_checked(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET.format(model=tiny_model, statistics=tmp_path / "missing"))
    code, _, figures = doctor(tmp_path, "-f", str(tmp_path / "fleet.yaml"))
    assert code == 1
    refused = [finding["subject"] for finding in figures["findings"] if finding["verdict"] == "refused"]
    assert refused == ["policy"]
    assert figures["figures"]["pool_blocks"] == 99


def test_a_model_that_is_refused_and_why(tmp_path: Path) -> None:
    code, output, figures = doctor(tmp_path, "--model", str(save_mla_model(tmp_path / "model")))
    assert code == 1
    assert "would be refused" in output
    assert figures["served"] is False
    verdict, sentence = findings(figures)["settings"]
    assert verdict == "refused"
    assert sentence.startswith("KV compression does not support multi-head latent attention")


def test_nothing_to_check_is_said_in_a_sentence() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.output == "neither --model nor --file is set: name a model or a fleet's settings\n"
