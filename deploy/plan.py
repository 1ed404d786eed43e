"""Capacity planning: how many requests fit a GPU, how many GPUs so many users need, with and without compression.

Pure arithmetic on a model's shape, with the same bound that the engine admits by (`triattention.bounds`).
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from deploy.model_shape import ModelShape
from triattention.bounds import blocks_bound, cdiv
from triattention.config import CompressionConfig

GIB = 1024**3
# Steps whose tokens are scheduled but not processed, with vLLM's async scheduling: a token each of one that decodes.
STEPS_IN_FLIGHT = DECODE_IN_FLIGHT_TOKENS = 2


class PlanError(ValueError):
    """There is no such plan; the message is one sentence."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, and the part of it that vLLM may use."""

    memory_bytes: int
    utilization: float = 0.92
    """vLLM's `gpu_memory_utilization`."""
    overhead_bytes: int = GIB
    """CUDA context, activations and CUDA graphs. vLLM measures them at start and logs what it found."""


@dataclass(frozen=True)
class Load:
    """Requests of one kind. Sizes in tokens."""

    prompt_tokens: int
    output_tokens: int
    users: int
    """Requests that are to be decoded at the same time."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Prices:
    """What an hour of one GPU costs and draws; None where it is not given."""

    gpu_hour: float | None = None
    gpu_watts: float | None = None
    kilowatt_hour: float | None = None


@dataclass(frozen=True)
class Side:
    """The plan with compression, or without."""

    blocks_per_request: int
    """Most blocks of full-attention layers that a request ever holds."""
    bytes_per_request: int
    """The same with what sliding layers hold, on each GPU of a replica."""
    requests_per_replica: int
    """Requests of this size that a replica decodes at once; 0: not even one fits."""
    gpus: int | None
    """For all users; None where no number of GPUs is enough, because one request does not fit."""
    cost_per_hour: float | None
    kilowatts: float | None
    energy_cost_per_hour: float | None

    @property
    def fits(self) -> bool:
        return self.requests_per_replica > 0


@dataclass(frozen=True)
class Plan:
    """Bytes are on each GPU of a replica."""

    model: ModelShape
    gpu: Gpu
    load: Load
    compression: CompressionConfig
    tensor_parallel: int
    block_size: int
    max_num_batched_tokens: int
    weights_bytes: int
    kv_bytes: int
    """What is left for the KV pool."""
    bytes_per_token: int
    """In full-attention layers: what a request grows by."""
    bytes_per_block: int
    sliding_bytes_per_request: int
    total_blocks: int
    """Of the KV pool, without vLLM's null block."""
    without_compression: Side
    with_compression: Side

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["compression"] = self.compression.model_dump(include={"budget", "interval", "prompt", "sinks"})
        for name, part in values.items():
            if isinstance(part, ModelShape | Gpu | Load | Side):
                values[name] = asdict(part)
        return values


def make_plan(
    model: ModelShape,
    gpu: Gpu,
    load: Load,
    compression: CompressionConfig,
    *,
    tensor_parallel: int = 1,
    block_size: int = 16,
    max_num_batched_tokens: int | None = None,
    prices: Prices | None = None,
) -> Plan:
    """`max_num_batched_tokens`: None is vLLM's default on such a GPU.

    Raises `PlanError` where the weights alone do not fit, or the heads cannot be split over the GPUs.
    """
    if model.attention_heads % tensor_parallel:
        raise PlanError(
            f"tensor parallel is {tensor_parallel}, but {model.name} has {model.attention_heads} attention heads: "
            "choose a number that divides them."
        )
    if model.kv_heads % tensor_parallel and tensor_parallel % model.kv_heads:
        raise PlanError(
            f"tensor parallel is {tensor_parallel}, but {model.name} has {model.kv_heads} KV heads: choose a number "
            "that divides them, or a multiple of them."
        )
    weights = model.weights_bytes // tensor_parallel
    kv = int(gpu.memory_bytes * gpu.utilization) - weights - gpu.overhead_bytes
    per_token = model.bytes_per_token(model.full_layers, tensor_parallel)
    per_block = block_size * per_token
    if kv < 2 * per_block:
        raise PlanError(
            f"The weights of {model.name} take {weights / GIB:.1f} GiB on each GPU and the overhead "
            f"{gpu.overhead_bytes / GIB:.1f} GiB, but vLLM may use {gpu.utilization:.0%} of "
            f"{gpu.memory_bytes / GIB:.1f} GiB: split the model over more GPUs, take larger ones, or quantize it."
        )
    max_num_batched_tokens = max_num_batched_tokens or _default_max_num_batched_tokens(gpu)
    sliding = _sliding_blocks(model, load, block_size, max_num_batched_tokens)
    sliding *= block_size * model.bytes_per_token(model.sliding_layers, tensor_parallel)

    def side(config: CompressionConfig | None) -> Side:
        blocks = blocks_bound(load.prompt_tokens, load.total_tokens, block_size, config, DECODE_IN_FLIGHT_TOKENS)
        size = blocks * per_block + sliding
        requests = (kv - per_block) // size  # less vLLM's null block
        gpus = cdiv(load.users, requests) * tensor_parallel if requests else None
        return _priced(Side(blocks, size, requests, gpus, None, None, None), prices or Prices())

    return Plan(
        model=model,
        gpu=gpu,
        load=load,
        compression=compression,
        tensor_parallel=tensor_parallel,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        weights_bytes=weights,
        kv_bytes=kv,
        bytes_per_token=per_token,
        bytes_per_block=per_block,
        sliding_bytes_per_request=sliding,
        total_blocks=kv // per_block - 1,
        without_compression=side(None),
        with_compression=side(compression),
    )


def _default_max_num_batched_tokens(gpu: Gpu) -> int:
    """As `EngineArgs.get_batch_defaults` of vLLM has it for a server; for an A100 of 80 GB it has 2,048, too."""
    if gpu.memory_bytes >= 160 * GIB:
        return 16_384
    return 8192 if gpu.memory_bytes >= 70 * GIB else 2048


def _sliding_blocks(model: ModelShape, load: Load, block_size: int, max_num_batched_tokens: int) -> int:
    """Most blocks that a request holds of a sliding layer, as the engine admits it (`triattention.vllm.pool`).

    A window slides when its tokens are processed, so what is in flight is held on top: of a prompt whole steps.
    """

    def most(tokens: int, in_flight: int) -> int:
        # One block more: the window begins in the middle of one and ends in the middle of another.
        return min(cdiv(tokens, block_size), cdiv(model.sliding_window - 1 + in_flight, block_size) + 1)

    prefilled = min(load.total_tokens, load.prompt_tokens + DECODE_IN_FLIGHT_TOKENS)
    return max(
        most(prefilled, STEPS_IN_FLIGHT * max_num_batched_tokens), most(load.total_tokens, DECODE_IN_FLIGHT_TOKENS)
    )


def _priced(side: Side, prices: Prices) -> Side:
    if side.gpus is None:
        return side
    kilowatts = None if prices.gpu_watts is None else side.gpus * prices.gpu_watts / 1000
    energy = None
    if kilowatts is not None and prices.kilowatt_hour is not None:
        energy = kilowatts * prices.kilowatt_hour
    cost = None if prices.gpu_hour is None else side.gpus * prices.gpu_hour
    return replace(side, cost_per_hour=cost, kilowatts=kilowatts, energy_cost_per_hour=energy)
