"""Dashboard "Requests": what clients feel of the fleet: admitted or refused, and how long they wait."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.board import Row, board
from dashboards.panels import (
    COUNT,
    GREEN,
    ORANGE,
    PER_SECOND,
    RATIO,
    RED,
    SECONDS,
    Query,
    heat,
    lines,
    value,
)
from dashboards.promql import bucket_rate, increase, mean, quantile, rate, series
from deploy.metrics import (
    ADMISSIONS,
    BLOCK_SECONDS,
    ENDED_REQUESTS,
    FIRST_TOKEN,
    FIRST_TOKEN_TARGET,
    OUTPUT_TOKENS,
    PER_TOKEN,
    PROMPT_TOKENS,
    QUEUE_LENGTH,
    QUEUE_WAIT,
    REJECTIONS,
    RUNNING,
    WAITING,
)

REFUSED = f"sum({increase(REJECTIONS)})"
SOME_REFUSED = ((None, GREEN), (0.01, ORANGE), (0.05, RED))


def dashboard() -> Dashboard:
    return board(
        "trifleet-requests",
        "Requests",
        "What clients feel: admitted, waiting or refused, by class. Short and long are told apart by "
        "short_request_tokens of the settings.",
        Row("In the period shown", (
            value("Admitted", "Requests placed on a replica.",
                  COUNT, Query(f"sum({increase(ADMISSIONS)})", "admitted"), width=5),
            value("Refused",
                  "Requests answered with 400, 401, 404, 413, 429 or 503; dashboard Fleet capacity shows the reasons.",
                  COUNT, Query(REFUSED, "refused"), width=5),
            value("Share refused", "Of all requests that were decided.",
                  RATIO, Query(f"{REFUSED} / (sum({increase(ADMISSIONS)}) + {REFUSED})", "share"),
                  width=5, steps=SOME_REFUSED),
            value("Wait for a replica now", "Requests in the coordinator's queue.",
                  COUNT, Query(f"sum({series(QUEUE_LENGTH)})", "waiting"), width=5),
            value("Decode now", "Sequences that the engines decode.",
                  COUNT, Query(f"sum({series(RUNNING)})", "running"), width=4),
        )),
        Row("Waiting for a replica", (
            lines(
                "Queue wait by class, 50th and 95th percentile",
                "From submission to placement; 0 for who is placed at once. A long wait with headroom left: look "
                "at dashboard Routing for stale replicas.",
                SECONDS,
                Query(quantile(0.5, QUEUE_WAIT, "class"), "{{class}}, half"),
                Query(quantile(0.95, QUEUE_WAIT, "class"), "{{class}}, 95 %"),
            ),
            lines("Mean queue wait by class", "From submission to placement.",
                  SECONDS, Query(mean(QUEUE_WAIT, "class"), "{{class}}")),
            heat("Queue wait, all requests", "Requests per second and length of wait.",
                 SECONDS, Query(bucket_rate(QUEUE_WAIT, "le"), "{{le}}")),
            lines("Queue length by class", "Requests in the coordinator's queue.",
                  COUNT, Query(f"sum by (class) ({series(QUEUE_LENGTH)})", "{{class}}")),
        )),
        Row("Throughput", (
            lines(
                "Requests decided per second",
                "Admitted against refused, whatever the reason.",
                PER_SECOND,
                Query(f"sum({rate(ADMISSIONS)})", "admitted"),
                Query(f"sum({rate(REJECTIONS)})", "refused"),
                width=8,
            ),
            lines("Sequences that decode, by replica", "As the engines report.",
                  COUNT, Query(series(RUNNING), "{{replica}}"), width=8),
            lines(
                "Sequences that wait inside an engine, by replica",
                "Placed but not running: the engine's max_num_seqs is reached, or a preempted one waits for blocks.",
                COUNT, Query(series(WAITING), "{{replica}}"), width=8,
            ),
        )),
        Row("By tier", (
            lines(
                "Time to first token by tier and class, 95th percentile",
                "From a request's arrival at the router to the first byte of its answer, queue included, against the "
                "tier's target (0: none).",
                SECONDS,
                Query(quantile(0.95, FIRST_TOKEN, "tier, class"), "{{tier}}, {{class}}"),
                Query(f"max by (tier) ({series(FIRST_TOKEN_TARGET)})", "target of {{tier}}"),
            ),
            lines(
                "Time per output token by tier and class, 50th and 95th percentile",
                "A sequence's mean after its first token, as vLLM measures it. Climbs with the number of sequences "
                "that decode together.",
                SECONDS,
                Query(quantile(0.5, PER_TOKEN, "tier, class"), "{{tier}}, {{class}}, half"),
                Query(quantile(0.95, PER_TOKEN, "tier, class"), "{{tier}}, {{class}}, 95 %"),
            ),
            lines("Requests that ended per second, by tier", "In whatever way.",
                  PER_SECOND, Query(f"sum by (tier) ({rate(ENDED_REQUESTS)})", "{{tier}}")),
            lines("Tokens per second, by tier and class", "Counted when a request ends; prompts by tier alone.",
                  PER_SECOND,
                  Query(f"sum by (tier, class) ({rate(OUTPUT_TOKENS)})", "output, {{tier}}, {{class}}"),
                  Query(f"sum by (tier) ({rate(PROMPT_TOKENS)})", "prompt, {{tier}}")),
            lines("KV blocks held on average, by tier", "Block-seconds per second: what fair share is weighed by.",
                  COUNT, Query(f"sum by (tier) ({rate(BLOCK_SECONDS)})", "{{tier}}")),
        )),
    )  # fmt: skip
