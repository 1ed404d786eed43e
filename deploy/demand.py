"""How many KV blocks a request needs on a replica, and the refusal of one that can never fit. No state."""

from collections.abc import Sequence

from deploy.messages import Demand, Refusal, ReplicaLimits
from triattention.bounds import blocks_bound
from triattention.report import EngineReport


def blocks_needed(demand: Demand, limits: ReplicaLimits, engine: EngineReport) -> int:
    """Most blocks that the request ever holds at once on that replica, over all its sequences."""
    bound = blocks_bound(
        demand.prompt_tokens,
        demand.total_tokens,
        engine.block_size,
        limits.compression,
        engine.in_flight_tokens,
    )
    return max(1, bound) * demand.sequences


def usable_blocks(engine: EngineReport, watermark_blocks: int) -> int:
    """What one request can have at most on an otherwise empty replica."""
    return engine.total_blocks - watermark_blocks


def can_ever_fit(demand: Demand, limits: ReplicaLimits, engine: EngineReport, watermark_blocks: int) -> bool:
    if demand.total_tokens > limits.max_model_len:
        return False
    return blocks_needed(demand, limits, engine) <= usable_blocks(engine, watermark_blocks)


def refuse_if_never(
    demand: Demand, replicas: Sequence[tuple[ReplicaLimits, EngineReport]], watermark_blocks: int
) -> Refusal | None:
    """A 400 that names the limit when no known replica could ever take the request, else None.

    Without any known replica nothing is known of the limits, so nothing is refused.
    """
    if not replicas or any(can_ever_fit(demand, *replica, watermark_blocks) for replica in replicas):
        return None
    longest = max(limits.max_model_len for limits, _ in replicas)
    if demand.total_tokens > longest:
        output = demand.total_tokens - demand.prompt_tokens
        return Refusal(
            demand.reservation,
            status=400,
            reason="over_max_model_len",
            message=(
                f"The request asks for {demand.prompt_tokens} prompt and {output} output tokens, "
                f"{demand.total_tokens} together, but max_model_len is {longest}: "
                "shorten the prompt or lower max_tokens."
            ),
        )
    # Refused by the pool: of the replicas whose length limit allows it, name the one that comes closest.
    need, usable = min(
        (
            (blocks_needed(demand, limits, engine), usable_blocks(engine, watermark_blocks))
            for limits, engine in replicas
            if demand.total_tokens <= limits.max_model_len
        ),
        key=lambda pair: pair[0] - pair[1],
    )
    return Refusal(
        demand.reservation,
        status=400,
        reason="over_kv_pool",
        message=(
            f"The request can hold {need} KV blocks, but a replica's KV pool has {usable} to give: "
            "lower max_tokens or n, or shorten the prompt."
        ),
    )
