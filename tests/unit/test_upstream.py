"""Upstream's statistics files are read without running them, and only for a model that they can be of."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from tests.unit.tiny_models import llama, qwen3, random_statistics, yarn
from triattention.statistics import QueryStatistics
from triattention.upstream import import_statistics


def upstream_file(path: Path, statistics: QueryStatistics, **metadata: Any) -> Path:
    """What upstream's calibration script would save for these numbers."""
    entries = {
        f"layer{layer:02d}_head{head:02d}": {
            "q_mean_real": statistics.query_mean[layer, head].real.clone(),
            "q_mean_imag": statistics.query_mean[layer, head].imag.clone(),
            "q_abs_mean": statistics.query_magnitude[layer, head].clone(),
        }
        for layer in statistics.layers
        for head in range(statistics.q_heads)
    }
    written = {
        "num_traces": 1, "head_dim": 16, "dtype": "bfloat16", "use_chat_template": False, "system_prompt": "",
        "attn_implementation": "sdpa", "rope_style": "half", "rope_type": "default",
        "sampled_heads": [[layer, head] for layer in statistics.layers for head in range(statistics.q_heads)],
    }  # fmt: skip
    torch.save({"metadata": written | metadata, "stats": entries}, path)
    return path


def model_folder(path: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(path)
    return path


@pytest.mark.parametrize(("config", "rope_type"), [(qwen3(), "default"), (yarn(), "yarn")], ids=["qwen3", "yarn"])
def test_the_numbers_arrive_and_load_as_our_own(tmp_path: Path, config: PreTrainedConfig, rope_type: str) -> None:
    original = random_statistics(config)
    file = upstream_file(tmp_path / "stats.pt", original, rope_type=rope_type)
    imported = import_statistics(file, model_folder(tmp_path / "model", config))
    assert torch.equal(imported.query_mean, original.query_mean)
    assert torch.equal(imported.query_magnitude, original.query_magnitude)
    imported.save(tmp_path / "out.safetensors")
    assert QueryStatistics.load(tmp_path / "out.safetensors", config).rope == original.rope


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "run",))

    torch.save({"metadata": {}, "stats": Malice()}, tmp_path / "stats.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malice()))
    for name in ("stats.pt", "plain.pt"):
        with pytest.raises(ValueError, match="is not a statistics file of upstream's TriAttention"):
            import_statistics(tmp_path / name, model_folder(tmp_path / "model", llama()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt is not a statistics file"):
        import_statistics(tmp_path / "x.pt", model_folder(tmp_path / "model", llama()))


@pytest.mark.parametrize(
    ("config", "metadata", "named"),
    [
        (qwen3(num_hidden_layers=4), {}, "lack layer03_head00"),
        (qwen3(num_hidden_layers=2), {}, "hold layer02_head00, but .* has 2 layers of 4 query heads"),
        (qwen3(num_attention_heads=2), {}, "hold layer00_head02, but .* has 3 layers of 2 query heads"),
        (qwen3(head_dim=32), {}, "head_dim 16 but .* has 32"),
        (qwen3(), {"rope_style": "interleaved"}, "rope_style interleaved but .* has neox"),
        (yarn(), {}, "rope_type default but .* has yarn"),
    ],
)
def test_another_model_is_refused_by_what_differs(
    tmp_path: Path, config: PreTrainedConfig, metadata: dict[str, str], named: str
) -> None:
    file = upstream_file(tmp_path / "stats.pt", random_statistics(qwen3()), **metadata)
    with pytest.raises(ValueError, match=named):
        import_statistics(file, model_folder(tmp_path / "model", config))


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    statistics = random_statistics(qwen3())
    statistics.query_magnitude[1, 2, 3] = float("nan")
    file = upstream_file(tmp_path / "stats.pt", statistics)
    with pytest.raises(ValueError, match="no 8 finite numbers as q_abs_mean of layer01_head02"):
        import_statistics(file, model_folder(tmp_path / "model", qwen3()))
