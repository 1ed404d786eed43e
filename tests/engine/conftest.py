"""Tiny random models and engines, made once per session: an engine in this process starts in about 5 s."""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine core runs in the test's process, so tests can look into it
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3Config
from vllm import LLM, envs
from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform

from triattention.calibration import calibrate
from triattention.config import CompressionConfig
from triattention.vllm import engine_arguments

VOCABULARY = 512
BLOCK = 32


def save_tiny_model(config: PreTrainedConfig, path: Path) -> Path:
    """A random model of this config and a tokenizer whose words are t000, t001, ..."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    words = Tokenizer(WordLevel({f"t{i:03d}": i for i in range(VOCABULARY)}, unk_token="t000"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def save_statistics(model: Path, path: Path) -> Path:
    draw = random.Random(2)
    calibrate(model, [" ".join(f"t{draw.randrange(VOCABULARY):03d}" for _ in range(2000))], path)
    return path


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
"""Large weights make the models sensitive to what they attend to."""


@pytest.fixture(autouse=True)
def environment_is_read_anew() -> None:
    """An engine that has started in this process has vLLM keep what it read of the environment, for every test."""
    envs.disable_envs_cache()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 (q_norm, GQA group 2)."""
    return save_tiny_model(Qwen3Config(**SIZES), tmp_path_factory.mktemp("tiny") / "qwen3")


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """No length is a multiple of the block."""
    draw = random.Random(1)
    return [[draw.randrange(VOCABULARY) for _ in range(n)] for n in (5, 37, 70, 101)]


EngineFactory = Callable[..., LLM]


@contextmanager
def asynchronous_scheduling() -> Iterator[None]:
    """vLLM's CPU platform switches async scheduling off; its V1 runner can do it, so tests switch it on again."""
    check = CpuPlatform.check_and_update_config

    def switch_on(vllm_config: VllmConfig) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(switch_on))
        yield


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[EngineFactory]:
    """engine(config, **arguments): an engine in this process, one per distinct set of settings."""
    engines: dict[str, LLM] = {}

    def make(
        config: CompressionConfig | None, *, blocks: int | None = 160, model: Path = tiny_model, **arguments: Any
    ) -> LLM:
        settings = {
            "dtype": "float32", "max_model_len": 4096, "block_size": BLOCK, "max_num_seqs": 8,
            "num_gpu_blocks_override": blocks, "kv_cache_memory_bytes": 1 << 28, "enforce_eager": True,
            "skip_tokenizer_init": True, "max_num_batched_tokens": 512,
            **arguments,
        }  # fmt: skip
        key = repr((model, config, sorted(settings.items())))
        if key not in engines:
            compression = engine_arguments(config)
            compression["additional_config"]["triattention_reports"] = False  # vLLM's own loggers listen here
            with asynchronous_scheduling() if settings.get("async_scheduling") else nullcontext():
                engines[key] = LLM(str(model), **settings, **compression)
        return engines[key]

    yield make
    with pytest.MonkeyPatch.context() as patch:
        # Every shutdown collects garbage over the whole heap, several times: once at the end is enough.
        patch.setattr(gc, "collect", lambda *_: 0)
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(scope="session")
def statistics(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_statistics(tiny_model, tmp_path_factory.mktemp("statistics") / "tiny.safetensors")
