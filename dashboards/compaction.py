"""Dashboard "Compaction": how often the engines compact and how much memory that gives back."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.board import Row, board
from dashboards.panels import (
    BLOCKS,
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    GREEN,
    PER_MINUTE,
    PER_SECOND,
    RATIO,
    RED,
    SECONDS,
    Query,
    heat,
    lines,
    value,
)
from dashboards.promql import bucket_rate, increase, quantile, rate, rate_of_sum, series
from deploy.metrics import (
    BLOCK_TOKENS,
    COMPACTION_SECONDS,
    COMPACTIONS,
    EVICTED_TOKENS,
    FIRST_COMPACTION_SECONDS,
    FREED_BLOCKS,
    GENERATED_TOKENS,
    HELD_BLOCKS,
    PEAK_BLOCKS_PER_REQUEST,
    PINNED_BLOCKS,
    PREEMPTIONS,
    RECLAIMED_BYTES,
    RUNNING,
    STEP_SECONDS,
    STRANDED_SLOTS,
    UNCOMPRESSED_BLOCKS,
)

ZERO_IS_GOOD = ((None, GREEN), (1, RED))


def compaction_share(by: str) -> str:
    return f"{rate_of_sum(COMPACTION_SECONDS, by)} / (sum by ({by}) ({rate(STEP_SECONDS)}) > 0)"


def dashboard() -> Dashboard:
    return board(
        "trifleet-compaction",
        "Compaction",
        "How often the engines compact, and how much KV memory came back: in freed blocks, not in evicted tokens.",
        Row("In the period shown", (
            value(
                "Compactions",
                "0 under long requests: compression is off, or nothing grows past budget + interval.",
                COUNT, Query(f"sum({increase(COMPACTIONS)})", "compactions"), width=5,
            ),
            value(
                "Freed blocks",
                "Blocks that went back to the pools and could be given to others.",
                COUNT, Query(f"sum({increase(FREED_BLOCKS)})", "freed blocks"), width=5,
            ),
            value(
                "Memory reclaimed",
                "The freed blocks in bytes, over all layers.",
                BYTES, Query(f"sum({increase(RECLAIMED_BYTES)})", "reclaimed"), width=5,
            ),
            value(
                "Stranded slots",
                "Live slots lost to alignment: 0 by construction, anything else is a defect of the engine.",
                COUNT, Query(f"sum({series(STRANDED_SLOTS)})", "stranded slots"), width=4, steps=ZERO_IS_GOOD,
            ),
            value(
                "Preemptions",
                "Requests that lost all blocks and are computed again: the pool was promised too generously.",
                COUNT, Query(f"sum({increase(PREEMPTIONS)})", "preemptions"), width=5, steps=ZERO_IS_GOOD,
            ),
        )),
        Row("Pace", (
            lines(
                "Compactions per minute, by replica",
                "Every decoding request past its budget compacts once per interval.",
                PER_MINUTE, Query(f"60 * {rate(COMPACTIONS)}", "{{replica}}"), width=8,
            ),
            lines(
                "Freed blocks per second, by replica",
                "The pace at which compaction feeds the pool.",
                PER_SECOND, Query(rate(FREED_BLOCKS), "{{replica}}"), width=8,
            ),
            lines(
                "Memory reclaimed per second, by replica",
                "The same in bytes.",
                BYTES_PER_SECOND, Query(rate(RECLAIMED_BYTES), "{{replica}}"), width=8,
            ),
            lines(
                "Memory reclaimed since the engines' start, by replica",
                "A replica that starts anew starts from 0.",
                BYTES, Query(series(RECLAIMED_BYTES), "{{replica}}"),
            ),
            lines(
                "Preemptions per minute, by replica",
                "Should be 0: raise watermark_blocks, or lower the budget.",
                PER_MINUTE, Query(f"60 * {rate(PREEMPTIONS)}", "{{replica}}"),
            ),
        )),
        Row("Yield", (
            lines(
                "Freed blocks per compaction",
                "Interval over block size, where no block is shared with another request.",
                BLOCKS,
                Query(f"sum by (replica) ({rate(FREED_BLOCKS)}) / sum by (replica) ({rate(COMPACTIONS)})",
                      "{{replica}}"),
                width=8,
            ),
            lines(
                "Evicted tokens per freed block",
                "The block size, when every evicted token's memory came back. More: blocks stay because other "
                "requests share them.",
                COUNT,
                Query(f"sum by (replica) ({rate(EVICTED_TOKENS)}) / sum by (replica) ({rate(FREED_BLOCKS)})",
                      "{{replica}}"),
                width=8,
            ),
            lines(
                "Blocks per decoding request",
                "Live blocks over decoding sequences, and the most that one request has held: it stays under the "
                "bound of budget, interval and pinned prompt however long the answers get.",
                BLOCKS,
                Query(f"{series(HELD_BLOCKS)} / ({series(RUNNING)} > 0)", "mean of {{replica}}"),
                Query(series(PEAK_BLOCKS_PER_REQUEST), "most on {{replica}}"),
                width=8,
            ),
            lines(
                "Blocks in use, and what they would be without compaction",
                "The gap is memory that other requests can use. Pinned prompts are never compacted.",
                BLOCKS,
                Query(f"sum({series(HELD_BLOCKS)})", "in use"),
                Query(f"sum({series(PINNED_BLOCKS)})", "pinned prompts among them"),
                Query(f"sum({series(UNCOMPRESSED_BLOCKS)})", "without compaction"),
                width=8,
            ),
            heat(
                "Time to a request's first compaction",
                "From its arrival, by length of that time: how long until a request has outgrown its budget.",
                SECONDS, Query(bucket_rate(FIRST_COMPACTION_SECONDS, "le"), "{{le}}"), width=8,
            ),
            lines(
                "Bytes reclaimed per byte evicted, by replica",
                "Freed slots over evicted tokens: 1 when every evicted token's memory came back.",
                RATIO,
                Query(
                    f"{rate(FREED_BLOCKS)} * {series(BLOCK_TOKENS)} / ({rate(EVICTED_TOKENS)} > 0)", "{{replica}}"
                ),
                width=8,
            ),
        )),
        Row("Cost", (
            lines(
                "Share of the engines' time that compaction takes, by replica",
                "Compaction time over step time.",
                RATIO,
                Query(compaction_share("replica"), "{{replica}}"),
                width=8,
            ),
            lines(
                "Time of one compaction",
                "Score, select and move, all layers of one request.",
                SECONDS,
                Query(quantile(0.5, COMPACTION_SECONDS, "model"), "half"),
                Query(quantile(0.95, COMPACTION_SECONDS, "model"), "95 %"),
                width=8,
            ),
            lines(
                "Tokens generated per second, by replica",
                "Falls under load while compaction's share rises: the interval is too short.",
                PER_SECOND, Query(rate(GENERATED_TOKENS), "{{replica}}"), width=8,
            ),
        )),
    )  # fmt: skip
