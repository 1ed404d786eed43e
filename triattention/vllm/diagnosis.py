"""What would happen if an engine with compression were started for a model here, found out without loading its weights.

The checks are the engine's own, in its own order: vLLM's config, `support`, the worker on a model without weights, its
KV-cache specs, a KV cache of a few blocks in which layouts are detected. What is added is to go on after a refusal,
where that is possible, and to say what was found. Starts a worker in this process: for a process of its own.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_configs
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, SlidingWindowSpec

from triattention.bounds import blocks_bound, cdiv
from triattention.config import CompressionConfig
from triattention.rope import RopeParameters
from triattention.statistics import QueryStatistics
from triattention.vllm import engine_arguments, on_this_machine
from triattention.vllm.kv_manager import CompactedAttentionSpec
from triattention.vllm.self_calibration import statistics_path
from triattention.vllm.support import check_policy, refusals

Verdict = Literal["fine", "note", "refused"]


@dataclass(frozen=True)
class Finding:
    subject: str
    verdict: Verdict
    sentence: str


@dataclass
class Diagnosis:
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    """Blocks, tokens and bytes, where the engine gets so far as to have a KV cache."""

    @property
    def served(self) -> bool:
        return all(finding.verdict != "refused" for finding in self.findings)

    def add(self, subject: str, sentence: str, verdict: Verdict = "fine") -> None:
        self.findings.append(Finding(subject, verdict, sentence))

    @contextmanager
    def refusing(self, subject: str) -> Iterator[None]:
        """What is raised inside becomes a finding and ends the diagnosis: vLLM refuses by many kinds of errors."""
        try:
            yield
        except Exception as error:
            self.add(subject, sentence(error), "refused")
            raise _Refused from error


class _Refused(Exception):
    pass


def diagnose(
    arguments: dict[str, Any], config: CompressionConfig, prompt_tokens: int, assume_memory: bool
) -> Diagnosis:
    """`arguments`: of `vllm serve` by their Python names, compression aside. `prompt_tokens`: of the request whose
    bound is told.

    `assume_memory`: nobody said how much KV memory there is to be. On a CPU half of what is free is taken then, for
    vLLM's default, most of the machine's memory, says little about the model.
    """
    diagnosis = Diagnosis()
    arguments = on_this_machine(arguments)
    if assume_memory and current_platform.is_cpu():
        arguments = {**arguments, "kv_cache_memory_bytes": psutil.virtual_memory().available // 2}
    with suppress(_Refused):
        _diagnose(diagnosis, _of_the_engine(diagnosis, arguments), config, prompt_tokens)
    return diagnosis


def _of_the_engine(diagnosis: Diagnosis, arguments: dict[str, Any]) -> dict[str, Any]:
    """Without those of vLLM's front end, which a replica takes too."""
    engine = {argument.name for argument in fields(EngineArgs)}
    others = set(arguments) - engine
    with diagnosis.refusing("settings"):
        if others and (unknown := sorted(others - set(vars(make_arg_parser(FlexibleArgumentParser()).parse_args([]))))):
            raise ValueError(f"vLLM has no argument {', '.join(unknown)}: correct engine.extra in the settings")
    return {name: value for name, value in arguments.items() if name in engine}


def _diagnose(diagnosis: Diagnosis, arguments: dict[str, Any], config: CompressionConfig, prompt_tokens: int) -> None:
    with diagnosis.refusing("model"):
        asked = EngineArgs(**arguments, **engine_arguments(config)).create_engine_config(UsageContext.OPENAI_API_SERVER)
    text = asked.model_config.hf_text_config
    heads, kv_heads = asked.model_config.hf_text_config.num_attention_heads, asked.model_config.get_total_num_kv_heads()
    diagnosis.add(
        "model",
        f"{', '.join(asked.model_config.architectures)}: {text.num_hidden_layers} layers, {heads} query heads on "
        f"{kv_heads} KV heads, head size {asked.model_config.get_head_size()}, {asked.model_config.dtype}".replace(
            "torch.", ""
        ),
    )
    unsupported = refusals(asked)
    for sentence in unsupported:
        diagnosis.add("settings", sentence, "refused")
    if unsupported:
        return
    diagnosis.add("settings", "nothing that compaction cannot work with is switched on")
    _check_rope_and_policy(diagnosis, asked, config)

    # One process holds all the heads here, and the policy was judged above: neither changes what is found below.
    alone = {**arguments, "tensor_parallel_size": 1}
    unscored = config.model_copy(update={"policy": "random", "statistics": None})
    with diagnosis.refusing("machine"):
        vllm_config = EngineArgs(**alone, **engine_arguments(unscored)).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
    with set_current_vllm_config(vllm_config):
        _check_worker(diagnosis, vllm_config, config, prompt_tokens)


def _check_rope_and_policy(diagnosis: Diagnosis, vllm_config: VllmConfig, config: CompressionConfig) -> None:
    with diagnosis.refusing("RoPE"):
        rope = RopeParameters.from_config(vllm_config.model_config.hf_text_config)
    pairs = "half-split (neox)" if rope.style == "neox" else "interleaved (gptj)"
    scaling = "" if rope.attention_scaling == 1 else f", attention scaling {rope.attention_scaling:.4g}"
    diagnosis.add("RoPE", f"{pairs} pairs, {rope.rotary_dim} of {rope.head_dim} numbers rotated{scaling}")
    if config.statistics == "self":
        with diagnosis.refusing("policy"):
            path = statistics_path(vllm_config.model_config)
            update = {"statistics": path} if path.exists() else {}
            check_policy(config.model_copy(update=update), vllm_config)
        state = f"those in {path} are used" if path.exists() else "they are measured at the first start"
        diagnosis.add("policy", f"{config.policy}; statistics: self, {state}", "note")
        return
    try:
        check_policy(config, vllm_config)
    except ValueError as error:
        diagnosis.add("policy", sentence(error), "refused")
    else:
        suffix = f"; {config.statistics} fits this model" if config.statistics is not None else ""
        diagnosis.add("policy", f"{config.policy}{suffix}")


def _check_worker(diagnosis: Diagnosis, vllm_config: VllmConfig, config: CompressionConfig, prompt_tokens: int) -> None:
    from triattention.vllm.worker import CompactionWorker  # decides for a platform when it is imported

    with diagnosis.refusing("machine"), tempfile.TemporaryDirectory() as folder:
        worker = CompactionWorker(
            vllm_config,
            local_rank=0,
            rank=0,
            distributed_init_method=f"file://{folder}/store",
            is_driver_worker=True,
        )
        worker.init_device()
        # As vLLM's loader does it: layers take the dtype of their keys from torch's default.
        with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
            model = initialize_model(vllm_config)
        if vllm_config.use_v2_model_runner:
            worker.model_runner.load_model(model=model)  # makes what else its KV cache asks for
        else:
            worker.model_runner.model = model
    with diagnosis.refusing("layers"):
        specs = worker.get_kv_cache_spec()
    diagnosis.add("layers", _layers(specs))
    if isinstance(config.statistics, Path) and diagnosis.served:  # else it is they that were refused
        compacted = [name for name, spec in specs.items() if isinstance(spec, CompactedAttentionSpec)]
        with diagnosis.refusing("policy"):
            QueryStatistics.load(
                config.statistics, vllm_config.model_config.hf_text_config, [extract_layer_index(n) for n in compacted]
            )
    with diagnosis.refusing("pool"):
        layouts = [worker.get_supported_kv_cache_layouts()]
        worker.set_kv_cache_layout(resolve_kv_cache_layout(vllm_config, layouts, list(specs.values())).name)
        memory, estimated = _kv_memory(worker, vllm_config)
        [cache] = get_kv_cache_configs(vllm_config, [specs], [memory])
    _check_pool(diagnosis, vllm_config, cache, config, prompt_tokens, estimated)
    with diagnosis.refusing("KV cache"):
        worker.initialize_from_config(_a_few_blocks(vllm_config, cache))
        layers: dict[str, Attention] = vllm_config.compilation_config.static_forward_context
        backends = sorted({layers[name].get_attn_backend().get_name() for name in specs})
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    diagnosis.add(
        "KV cache",
        f"{current_platform.device_type}, {', '.join(backends)}, {runner} model runner, "
        f"kv_cache_dtype {vllm_config.cache_config.cache_dtype}: the layout is known",
    )


def _layers(specs: dict[str, KVCacheSpec]) -> str:
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name, spec in specs.items():
        if isinstance(spec, CompactedAttentionSpec):
            kind = "compressed"
        elif isinstance(spec, SlidingWindowSpec):
            kind = f"left alone, sliding window of {spec.sliding_window} tokens"
        else:
            kind = f"left alone, {type(spec).__name__.removesuffix('Spec')}"
        kinds[kind].append(next(part for part in name.split(".") if part.isdigit()))
    return "; ".join(f"{len(layers)} {kind} ({', '.join(layers)})" for kind, layers in kinds.items())


def _kv_memory(worker: Any, vllm_config: VllmConfig) -> tuple[int, bool]:
    """Bytes for the KV cache, and whether that is an estimate: the engine measures with the weights loaded."""
    explicit = vllm_config.cache_config.kv_cache_memory_bytes
    if explicit is not None:
        return explicit, False
    folder = Path(vllm_config.model_config.model)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    requested = worker.requested_cpu_memory if current_platform.is_cpu() else worker.requested_memory
    used = psutil.Process().memory_info().rss if current_platform.is_cpu() else 0
    return requested - used - weights, vllm_config.cache_config.num_gpu_blocks_override is None


def _check_pool(
    diagnosis: Diagnosis,
    vllm_config: VllmConfig,
    cache: KVCacheConfig,
    config: CompressionConfig,
    prompt_tokens: int,
    estimated: bool,
) -> None:
    length = vllm_config.model_config.max_model_len
    prompt_tokens = min(prompt_tokens, length - 1)
    bound = plain = 0
    for group in cache.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, CompactedAttentionSpec):
            in_flight = spec.decode_in_flight_tokens if config.prompt == "pin" else spec.chunk_in_flight_tokens
            bound += blocks_bound(prompt_tokens, length, spec.block_size, config, in_flight)
            plain += cdiv(length, spec.block_size)
        else:
            others = _blocks_of(group, vllm_config)
            bound, plain = bound + others, plain + others
    pool = cache.num_blocks - 1  # without the null block
    block_bytes = sum(tensor.size for tensor in cache.kv_cache_tensors) // cache.num_blocks
    diagnosis.figures = {
        "max_model_len": length,
        "prompt_tokens": prompt_tokens,
        "block_size": vllm_config.cache_config.block_size,
        "bytes_per_block": block_bytes,
        "blocks_bound": bound,
        "blocks_without_compression": plain,
        "pool_blocks": pool,
        "requests_at_once": pool // bound,
        "requests_at_once_without_compression": pool // plain,
    }
    diagnosis.add(
        "request",
        f"{length:,} tokens, {prompt_tokens:,} of them prompt, hold at most {bound:,} blocks "
        f"({_size(bound * block_bytes)}) instead of {plain:,} ({_size(plain * block_bytes)})",
    )
    how = ", estimated" if estimated else ""
    fit = f"{pool:,} blocks ({_size(pool * block_bytes)}{how})"
    if pool < bound:
        diagnosis.add("pool", f"{fit} are fewer than one such request needs: it would be refused", "note")
    else:
        diagnosis.add("pool", f"{fit} hold {pool // bound:,} such requests at once instead of {pool // plain:,}")


def _blocks_of(group: KVCacheGroupSpec, vllm_config: VllmConfig) -> int:
    return cdiv(group.kv_cache_spec.max_memory_usage_bytes(vllm_config), group.kv_cache_spec.page_size_bytes)


def _a_few_blocks(vllm_config: VllmConfig, cache: KVCacheConfig) -> KVCacheConfig:
    """The same KV cache with little memory: enough to see how it lies."""
    override, vllm_config.cache_config.num_gpu_blocks_override = vllm_config.cache_config.num_gpu_blocks_override, 4
    try:
        few = get_kv_cache_config_from_groups(vllm_config, cache.kv_cache_groups, 0)
    finally:
        vllm_config.cache_config.num_gpu_blocks_override = override
    few.kv_cache_layout = vllm_config.cache_config.kv_cache_layout
    return few


def _size(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1024:.0f} KiB"


def sentence(error: Exception) -> str:
    """The reason in one line; pydantic puts its own lines around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return reason.removeprefix("Value error, ").split(" [type=")[0]
