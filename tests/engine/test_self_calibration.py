"""`statistics: self` against vLLM's own config objects: of which RoPE they are, and what is said where they fail."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import save_tiny_model
from tests.engine.test_refusals import vllm_config
from tests.unit.tiny_models import llama
from triattention.config import CompressionConfig
from triattention.vllm.self_calibration import statistics_path, with_statistics
from triattention.vllm.support import check_policy

SELF = CompressionConfig(budget=256, window=64, statistics="self")
YARN: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048,
    }
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache" / "triattention"


def test_rope_of_hf_overrides_is_measured_and_has_a_file_of_its_own(tiny_model: Path, cache: Path) -> None:
    plain, long = vllm_config(tiny_model, SELF), vllm_config(tiny_model, SELF, hf_overrides=YARN)
    assert statistics_path(plain.model_config) != statistics_path(long.model_config)
    for config in (plain, long):
        check_policy(with_statistics(SELF, config, 0), config)
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_hf_overrides_may_be_a_function(tiny_model: Path, cache: Path) -> None:
    def longer(config: Any) -> Any:
        config.rope_parameters = dict(YARN["rope_parameters"])
        return config

    config = vllm_config(tiny_model, SELF, hf_overrides=longer)
    check_policy(with_statistics(SELF, config, 0), config)


def test_a_model_that_cannot_be_loaded_is_no_fault_of_the_cache(tmp_path: Path, cache: Path) -> None:
    model = save_tiny_model(llama(), tmp_path / "model")
    config = vllm_config(model, SELF)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="but transformers cannot load it") as caught:
        with_statistics(SELF, config, 0)
    assert "cannot be written" not in str(caught.value)


def test_a_cache_that_cannot_be_written(tiny_model: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(ValueError, match=r"triattention cannot be written .*: set VLLM_CACHE_ROOT to"):
        with_statistics(SELF, vllm_config(tiny_model, SELF), 0)
