"""`statistics: self`: the engine measures its model's query statistics at start, once per machine and model.

Owns where they are kept, and that all who need them, ranks of an engine and replicas of a machine, use the same file.
How they are measured is `triattention.calibration`'s.
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from triattention.calibration import SHIPPED_TEXT, calibrate
from triattention.config import CompressionConfig
from triattention.rope import RopeParameters, read_config
from triattention.statistics import FORMAT, QueryStatistics, model_facts

# vLLM shows what its own loggers say, and no others'.
logger = init_logger(f"vllm.{__name__}")


def with_statistics(config: CompressionConfig, vllm_config: VllmConfig, local_rank: int) -> CompressionConfig:
    """`config` with a file for `statistics: self`, measured now if it is not there yet; others as they are.

    Processes that ask at the same time wait for the first, so all get the same numbers. Runs before vLLM loads its own
    weights: the whole model is loaded once more for it, on the rank's device. Raises ValueError, one sentence.
    """
    if config.statistics != "self":
        return config
    nodes = vllm_config.parallel_config.nnodes
    if nodes > 1:
        raise ValueError(
            f"statistics is self, but the engine runs on {nodes} nodes, which must not use different ones: run "
            "`trifleet calibrate` and name its file"
        )
    path = statistics_path(vllm_config.model_config)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("w")
    with lock:  # one process at a time on this machine; the lock ends with the process that holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            logger.info("statistics is self: using those that another rank or start measured, %s", path)
        else:
            _measure(vllm_config.model_config, path, local_rank)
    return config.model_copy(update={"statistics": path})


def statistics_path(model: ModelConfig) -> Path:
    """Where this machine keeps the statistics of just these weights, this config of the engine's and this text."""
    config = model.hf_text_config
    digest = hashlib.sha256(f"{FORMAT}".encode() + SHIPPED_TEXT.read_bytes())
    folder = _folder(model)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    served = [model_facts(config), RopeParameters.from_config(config).plain()]
    digest.update(json.dumps(served, sort_keys=True).encode())
    return Path(envs.VLLM_CACHE_ROOT) / "triattention" / f"{folder.name}-{digest.hexdigest()[:16]}.safetensors"


def _measure(model: ModelConfig, path: Path, local_rank: int) -> None:
    device = "cpu" if current_platform.is_cpu() else f"{current_platform.device_type}:{local_rank}"
    logger.info(
        "statistics is self: measuring the queries of %s on %s, from the text that ships; text like your traffic is "
        "better, see `trifleet calibrate`", model.model, device,
    )  # fmt: skip
    began = time.monotonic()
    folder = _folder(model)
    try:
        statistics: QueryStatistics = calibrate(
            folder, SHIPPED_TEXT, None, device=device, config=read_config(folder, model.hf_overrides)
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"statistics is self, but {model.model} does not fit on {device} beside what is there: run `trifleet "
            "calibrate` and name its file"
        ) from error
    with _writing(path):
        statistics.save(path)
    if device != "cpu":
        torch.accelerator.empty_cache()
    logger.info(
        "statistics is self: measured over %d tokens in %.1f s, kept in %s",
        statistics.tokens, time.monotonic() - began, path,
    )  # fmt: skip


def _folder(model: ModelConfig) -> Path:
    """The folder of the model's files; those of an id are fetched as vLLM would fetch them, at the same revision."""
    folder = Path(model.model)
    if folder.is_dir():
        return folder.resolve()
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(model.model, revision=model.revision, allow_patterns=patterns))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"statistics is self, but {path.parent} cannot be written ({error}): set VLLM_CACHE_ROOT to a folder that "
            "can"
        ) from error
