"""`trifleet calibrate` as a user types it: what cannot be calibrated ends in one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deploy.cli import app
from tests.unit.test_calibration import TEXT, save_model
from tests.unit.tiny_models import llama, qwen3, yarn
from triattention.statistics import QueryStatistics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    save_model(folder / "model", qwen3())
    (folder / "text").write_text("\n".join(TEXT))
    return folder / "model"


def command(model: Path, out: Path, *options: str) -> tuple[int, str]:
    """Exit code, and the output in one line."""
    text = str(model.parent / "text")
    result = CliRunner().invoke(app, ["calibrate", "--model", str(model), "--text", text, "--out", str(out), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes it")
def test_a_device_that_torch_has_not(model: Path, tmp_path: Path) -> None:
    code, output = command(model, tmp_path / "out", "--device", "cuda")
    assert code == 1
    assert output == (
        "device is cuda, which torch cannot use here (Torch not compiled with CUDA enabled): set cpu, or the name of a "
        "device that this machine and this build of torch have"
    )


def test_a_device_that_nothing_has(model: Path, tmp_path: Path) -> None:
    code, output = command(model, tmp_path / "out", "--device", "foo")
    assert code == 1
    assert output.startswith("device is foo, which torch cannot use here (Expected one of cpu, cuda")


def test_statistics_do_not_take_the_place_of_a_device_or_a_pipe(model: Path, tmp_path: Path) -> None:
    """Their file is put where the old one was, which for /dev/null is the end of it."""
    os.mkfifo(pipe := tmp_path / "pipe")
    code, output = command(model, pipe)
    assert code == 1
    assert output.startswith(f"out is {pipe}, which is no ordinary file")
    assert pipe.is_fifo()


def test_a_text_that_is_not_utf_8_is_named(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "latin"
    text.write_bytes("schön".encode("latin-1"))
    code, output = command(model, tmp_path / "out", "--text", str(text))
    assert code == 1
    assert f"--text is {text}, which is not UTF-8 text" in output


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ImportError("\nLoading an AWQ quantized model requires gptqmodel.\nInstall it"),
            "model is {model}, but transformers cannot load it (Loading an AWQ quantized model requires gptqmodel.): "
            "calibrate the model that it was quantized from, whose statistics fit it",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "The model and a chunk of text do not fit on cpu: lower --chunk-tokens, or set --device cpu",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    code, output = command(model, tmp_path / "out")
    assert code == 1
    assert output == sentence.format(model=model)


def test_a_model_without_weights(tmp_path: Path) -> None:
    save_model(tmp_path / "model", llama())
    (tmp_path / "text").write_text("w1")
    (tmp_path / "model" / "model.safetensors").unlink()
    code, output = command(tmp_path / "model", tmp_path / "out")
    assert code == 1
    assert "but transformers cannot load it (Error no file named model.safetensors" in output


def test_a_chunk_beyond_the_models_context(model: Path, tmp_path: Path) -> None:
    code, output = command(model, tmp_path / "out", "--chunk-tokens", "4097")
    assert code == 1
    assert output == (
        "chunk_tokens is 4097, but the model's context is 4096 tokens (max_position_embeddings): set at most 4096"
    )


def test_overrides_of_the_config_as_vllm_takes_them(model: Path, tmp_path: Path) -> None:
    overrides = {"rope_parameters": yarn().rope_parameters}
    code, output = command(model, tmp_path / "out", "--hf-overrides", json.dumps(overrides))
    assert code == 0, output
    QueryStatistics.load(tmp_path / "out", yarn())


@pytest.mark.parametrize("overrides", ["{rope", "[1]"])
def test_overrides_that_are_no_json_object(model: Path, tmp_path: Path, overrides: str) -> None:
    code, output = command(model, tmp_path / "out", "--hf-overrides", overrides)
    assert code == 2
    assert "write a JSON object" in output


def test_overrides_that_make_no_config(model: Path, tmp_path: Path) -> None:
    partial = '{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}'
    code, output = command(model, tmp_path / "out", "--hf-overrides", partial)
    assert code == 1
    assert output.endswith(
        "name values as the model's config.json does, and rope_parameters whole, rope_theta included"
    )


def test_the_help_tells_defaults_that_are_no_numbers() -> None:
    shown = " ".join(CliRunner().invoke(app, ["calibrate", "--help"]).output.replace("│", "").split())
    assert "a text that ships" in shown
    assert "4096, or the model's context if less" in shown
