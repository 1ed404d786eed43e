"""Query statistics survive their file, and a file that does not fit is refused with a sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import FalconConfig, GPTNeoXConfig, PersimmonConfig, PreTrainedConfig

from tests.unit.tiny_models import llama, qwen3, random_statistics, yarn
from triattention.statistics import QueryStatistics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "statistics.safetensors"


def test_load_gives_back_what_was_saved(path: Path) -> None:
    config = yarn()
    saved = random_statistics(config)
    saved.save(path)
    loaded = QueryStatistics.load(path, config)
    assert torch.equal(loaded.query_mean, saved.query_mean)
    assert torch.equal(loaded.query_magnitude, saved.query_magnitude)
    for field in ("model_id", "facts", "rope", "layers", "tokens", "config_digest", "q_heads", "kv_heads"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers 3 but this model has 4"),
        ({"num_attention_heads": 8}, "num_attention_heads 4 but this model has 8"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2 but this model has 4"),
        ({"head_dim": 32}, "head_dim 16 but this model has 32"),
        ({"vocab_size": 65}, "vocab_size 64 but this model has 65"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "RoPE frequency of band 1"),
    ],
)
def test_refuses_a_model_that_differs_and_names_the_difference(
    path: Path, changes: dict[str, object], named: str
) -> None:
    random_statistics(qwen3()).save(path)
    with pytest.raises(ValueError, match=f"{named}.*trifleet calibrate"):
        QueryStatistics.load(path, qwen3(**changes))


OLD = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [
        (qwen3(), 2),
        (GPTNeoXConfig(**OLD), 4),
        (PersimmonConfig(**OLD), 4),
        (FalconConfig(**OLD), 1),
        (FalconConfig(**OLD, multi_query=False), 4),
        (FalconConfig(**OLD, new_decoder_architecture=True, num_kv_heads=2), 2),
    ],
)
def test_knows_the_kv_heads_of_models_that_name_them_otherwise_or_not(config: PreTrainedConfig, kv_heads: int) -> None:
    assert random_statistics(config).kv_heads == kv_heads


def test_refuses_another_architecture_of_the_same_shape(path: Path) -> None:
    random_statistics(qwen3()).save(path)
    with pytest.raises(ValueError, match="model_type qwen3 but this model has llama"):
        QueryStatistics.load(path, llama())


def test_refuses_another_attention_scaling(path: Path) -> None:
    statistics = random_statistics(yarn())
    replace(statistics, rope=replace(statistics.rope, attention_scaling=1.0)).save(path)
    with pytest.raises(ValueError, match=r"attention_scaling 1.0 against 1.138"):
        QueryStatistics.load(path, yarn())


def test_refuses_missing_layers_but_not_ones_that_are_not_needed(path: Path) -> None:
    whole = random_statistics(llama())
    replace(
        whole,
        layers=(0, 2),
        query_mean=whole.query_mean[[0, 2]],
        query_magnitude=whole.query_magnitude[[0, 2]],
    ).save(path)
    with pytest.raises(ValueError, match=r"lack layers \[1\]"):
        QueryStatistics.load(path, llama())
    assert QueryStatistics.load(path, llama(), layers=[2]).layers == (0, 2)


@pytest.mark.parametrize("name", ["query_mean", "query_magnitude"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_numbers_that_are_not_finite(path: Path, name: str, value: float) -> None:
    statistics = random_statistics(llama())
    getattr(statistics, name)[1, 2, 3] = value
    statistics.save(path)
    with pytest.raises(ValueError, match=f"NaN or infinity in {name} of layer 1"):
        QueryStatistics.load(path, llama())


def test_refuses_tensors_of_another_shape_than_the_header_says(path: Path) -> None:
    statistics = random_statistics(llama())
    replace(statistics, query_magnitude=statistics.query_magnitude[:, :2]).save(path)
    with pytest.raises(ValueError, match="query_magnitude of shape"):
        QueryStatistics.load(path, llama())


def test_others_may_read_the_file_as_any_that_is_written_here(path: Path) -> None:
    """An image, or a volume, is filled by one user and read by another."""
    random_statistics(qwen3()).save(path)
    beside = path.with_name("beside")
    beside.touch()
    assert path.stat().st_mode == beside.stat().st_mode


def test_refuses_a_missing_file(path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        QueryStatistics.load(path, llama())


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x80\x04pickle."])
def test_refuses_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="is not a file of query statistics"):
        QueryStatistics.load(tmp_path / "x", llama())


def rewrite_header(path: Path, **changes: object) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["triattention"]) | changes
        tensors = {name: file.get_tensor(name).clone() for name in ("query_mean", "query_magnitude")}
    save_file(tensors, path, metadata={"triattention": json.dumps(header)})


def test_refuses_safetensors_of_something_else(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="is not a file of query statistics"):
        QueryStatistics.load(tmp_path / "x", llama())


def test_refuses_another_format_version(path: Path) -> None:
    random_statistics(llama()).save(path)
    rewrite_header(path, format=2)
    with pytest.raises(ValueError, match="have format 2 but this version reads format 1"):
        QueryStatistics.load(path, llama())


def test_refuses_a_header_whose_digest_does_not_match(path: Path) -> None:
    statistics = random_statistics(llama())
    statistics.save(path)
    rewrite_header(path, facts=statistics.facts | {"vocab_size": 65})
    with pytest.raises(ValueError, match="header that was altered"):
        QueryStatistics.load(path, llama(vocab_size=65))
