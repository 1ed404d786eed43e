"""Dashboard "Fleet capacity": how much the fleet can still take, where, and who waits for it."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.board import Row, board
from dashboards.panels import (
    BLOCKS,
    BLUE,
    BYTES,
    COUNT,
    GREEN,
    GREY,
    JOULES,
    ORANGE,
    PER_SECOND,
    PURPLE,
    RATIO,
    RED,
    WATTS,
    Query,
    bars,
    lines,
    stacked,
    value,
)
from dashboards.promql import rate, series
from deploy.metrics import (
    BLOCK_BYTES,
    DRAINING,
    FREE_BLOCKS,
    FRESH,
    GENERATED_TOKENS,
    GPU_ENERGY_JOULES,
    GPU_MEMORY_BYTES,
    GPU_MEMORY_USED_BYTES,
    GPU_POWER_WATTS,
    GPUS,
    HEADROOM_BLOCKS,
    HELD_BLOCKS,
    PEAK_BLOCKS_PER_REQUEST,
    PLACEMENTS,
    PREDICTED_BLOCKS,
    QUEUE_LENGTH,
    QUEUED_BLOCKS,
    REJECTIONS,
    RESERVED_BLOCKS,
    RUNNING,
    TOTAL_BLOCKS,
)

# Nothing is placed on a replica that is silent or drains: its headroom is not the fleet's. Below 0 a replica has
# promised too much, which is not missing on the others.
TAKES_REQUESTS = f"{series(FRESH)} * (1 - {series(DRAINING)})"
PLACEABLE = f"clamp_min({series(HEADROOM_BLOCKS)}, 0) * {TAKES_REQUESTS}"
# As a filter: the 0 of a replica that takes nothing is neither the least nor the most that one has left.
OF_PLACEABLE = f"({series(HEADROOM_BLOCKS)} and {TAKES_REQUESTS} == 1)"
# As in the rule of TrifleetHeadroomLow. Where all drain, nothing is left.
STAYS = f"clamp_min(sum({series(TOTAL_BLOCKS)} * (1 - {series(DRAINING)})), 1)"
WATERMARK = (
    f"{series(FREE_BLOCKS)} - {series(RESERVED_BLOCKS)} - {series(PREDICTED_BLOCKS)} - {series(HEADROOM_BLOCKS)}"
)
# A fleet may have replicas with and without GPUs: only those with count.
JOIN = "cluster, model, replica"
HAS_GPUS = f"({series(GPUS)} > bool 0)"
PLACED_ON_GPUS = f"{rate(PLACEMENTS)} * on ({JOIN}) group_left () {HAS_GPUS}"
LITTLE_LEFT = ((None, RED), (0.05, ORANGE), (0.15, GREEN))
LITTLE_FREE = ((None, GREEN), (0.85, ORANGE), (0.95, RED))


def dashboard() -> Dashboard:
    return board(
        "trifleet-capacity",
        "Fleet capacity",
        "How many KV blocks the fleet has, what they are taken by, and what is left to promise.",
        Row("Now", (
            value(
                "Headroom",
                "Blocks that can still be promised to new requests, on replicas that report and do not drain. "
                "Where it stays near 0 requests wait: add replicas or lower the budget.",
                BLOCKS, Query(f"sum({PLACEABLE})", "headroom"),
            ),
            value(
                "Headroom, share of the pools",
                "The same as a share of the pools that stay: those of replicas that drain will be gone.",
                RATIO, Query(f"sum({PLACEABLE}) / {STAYS}", "headroom"), steps=LITTLE_LEFT,
            ),
            value(
                "Lowest headroom",
                "The fullest replica of those that take requests. A long request fits only where one replica alone "
                "has the headroom.",
                BLOCKS, Query(f"bottomk(1, {OF_PLACEABLE})", "{{replica}}"), width=5,
            ),
            value(
                "Highest headroom",
                "The emptiest replica of those that take requests: the largest request that starts at once needs no "
                "more than this.",
                BLOCKS, Query(f"topk(1, {OF_PLACEABLE})", "{{replica}}"), width=5,
            ),
            value(
                "Replicas that take requests",
                "Those that report and do not drain. See dashboard Routing for the others.",
                COUNT, Query(f"sum({TAKES_REQUESTS})", "replicas"), width=3,
            ),
            value(
                "Requests that decode",
                "Sequences that the engines decode now: users served at this moment.",
                COUNT, Query(f"sum({series(RUNNING)})", "running"), width=3,
            ),
        )),
        Row("Blocks", (
            stacked(
                "What the fleet's blocks are taken by",
                "Live: held by requests. Predicted: what running requests may still take, up to their bound. "
                "Reserved: promised to requests that no report shows yet. Headroom: free to promise. "
                "Out of placement: it would be, on replicas that are silent or drain.",
                BLOCKS,
                {"live": BLUE, "predicted": ORANGE, "reserved": PURPLE, "headroom": GREEN, "out of placement": RED,
                 "watermark": GREY},
                Query(f"sum({series(HELD_BLOCKS)})", "live"),
                Query(f"sum({series(PREDICTED_BLOCKS)})", "predicted"),
                Query(f"sum({series(RESERVED_BLOCKS)})", "reserved"),
                Query(f"sum({PLACEABLE})", "headroom"),
                Query(f"sum(clamp_min({series(HEADROOM_BLOCKS)}, 0) * (1 - {TAKES_REQUESTS}))", "out of placement"),
                Query(f"sum({WATERMARK})", "watermark"),
                line=Query(f"sum({series(TOTAL_BLOCKS)})", "capacity"),
                width=16,
            ),
            bars(
                "Blocks in use, by replica",
                "One replica near 100 % beside others that are not: look at placements in dashboard Routing.",
                Query(f"{series(HELD_BLOCKS)} / {series(TOTAL_BLOCKS)}", "{{replica}}"), LITTLE_FREE, width=8,
            ),
            lines(
                "Headroom by replica",
                "Below 0 a replica has promised more than it has: its requests may be preempted.",
                BLOCKS, Query(series(HEADROOM_BLOCKS), "{{replica}}"),
            ),
            lines(
                "Free blocks by replica",
                "As the engine reports them, before anything promised is taken off.",
                BLOCKS, Query(series(FREE_BLOCKS), "{{replica}}"),
            ),
            lines(
                "KV memory",
                "The same pools in bytes.",
                BYTES,
                Query(f"sum({series(HELD_BLOCKS)} * {series(BLOCK_BYTES)})", "live"),
                Query(f"sum({series(TOTAL_BLOCKS)} * {series(BLOCK_BYTES)})", "capacity"),
            ),
            lines(
                "Requests that fit at the largest size seen",
                "Pool over the most blocks that one request has held: how many such requests the fleet decodes at "
                "once, against how many it decodes now.",
                COUNT,
                Query(f"sum({series(TOTAL_BLOCKS)} / ({series(PEAK_BLOCKS_PER_REQUEST)} > 0))", "fit"),
                Query(f"sum({series(RUNNING)})", "decode now"),
            ),
        )),
        Row("GPUs, where NVML is there", (
            lines(
                "Users served per GPU",
                "Sequences that decode over GPUs: what compression buys in hardware.",
                COUNT, Query(f"sum({series(RUNNING)} * on ({JOIN}) {HAS_GPUS}) / sum({series(GPUS)})", "users per GPU"),
                width=6,
            ),
            lines(
                "GPU memory in use, by replica",
                "vLLM takes its share at start and keeps it, full or empty: what fills inside it is above.",
                RATIO, Query(f"{series(GPU_MEMORY_USED_BYTES)} / {series(GPU_MEMORY_BYTES)}", "{{replica}}"), width=6,
            ),
            lines("GPU power, by replica", "All GPUs of a replica together.",
                  WATTS, Query(series(GPU_POWER_WATTS), "{{replica}}"), width=6),
            lines(
                "Energy per output token",
                "Of all GPUs, idle ones as well: falls as more users share a GPU.",
                JOULES,
                Query(f"sum({rate(GPU_ENERGY_JOULES)}) / sum({rate(GENERATED_TOKENS)} * on ({JOIN}) {HAS_GPUS})",
                      "per token"),
                width=6,
            ),
            lines(
                "Energy per request",
                "Of all GPUs, over the requests placed on them.",
                JOULES,
                Query(f"sum({rate(GPU_ENERGY_JOULES)}) / sum({PLACED_ON_GPUS})", "per request"),
                width=6,
            ),
        )),
        Row("Demand that does not fit", (
            lines(
                "Requests that wait for a replica",
                "By class: short requests do not wait behind long ones.",
                COUNT, Query(f"sum by (class) ({series(QUEUE_LENGTH)})", "{{class}}"), width=8,
            ),
            lines(
                "Blocks that the waiting requests need",
                "Against the headroom: a queue that needs more than the fleet has left drains only as requests end.",
                BLOCKS,
                Query(f"sum({series(QUEUED_BLOCKS)})", "needed"),
                Query(f"sum({PLACEABLE})", "headroom"),
                width=8,
            ),
            lines(
                "Refusals by reason",
                "queue_full and queue_deadline mean too little capacity; over_max_model_len and over_kv_pool are "
                "requests that no replica can ever serve; no_replica means that none reports; concurrent_requests and "
                "requests_per_minute are limits of a tier; no_key means no valid key where one is needed; bad_request, "
                "unknown_model and body_too_large are faulty requests; router_busy means that long prompts came faster "
                "than a router counts their tokens.",
                PER_SECOND, Query(f"sum by (reason) ({rate(REJECTIONS)})", "{{reason}}"), width=8,
            ),
        )),
    )  # fmt: skip
