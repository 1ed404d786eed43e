"""Dashboard "Routing": where requests go and why, and whether the coordinator's picture is true."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.board import Row, board
from dashboards.panels import (
    BLOCKS,
    COUNT,
    GREEN,
    ORANGE,
    PER_SECOND,
    RATIO,
    RED,
    SECONDS,
    Query,
    bars,
    lines,
    value,
)
from dashboards.promql import increase, rate, series
from deploy.metrics import (
    COORDINATOR_START,
    DRAINING,
    DRIFT_BLOCKS,
    FRESH,
    LEASE_EXPIRATIONS,
    PLACEMENTS,
    PROBES,
    REPORT_AGE,
    REPORTS_IGNORED,
    RESERVATIONS,
    RETRIES,
    RUNNING,
    TOTAL_BLOCKS,
    WAITING,
    WANTED_REPLICAS,
)

ZERO_IS_GOOD = ((None, GREEN), (1, RED))


def dashboard() -> Dashboard:
    return board(
        "trifleet-routing",
        "Routing",
        "Where requests are placed and why, how fresh the coordinator's knowledge is, and whether its ledger agrees "
        "with what the engines report.",
        Row("Now", (
            value("Oldest report", "Age of the report of the replica that was silent for longest.",
                  SECONDS, Query(f"max({series(REPORT_AGE)})", "age"),
                  width=6, steps=((None, GREEN), (1, ORANGE), (2, RED))),
            value("Replicas out of placement", "Silent for longer than stale_report_seconds: nothing new goes there.",
                  COUNT, Query(f"sum(1 - {series(FRESH)})", "silent"), width=6, steps=ZERO_IS_GOOD),
            value("Leases run out, in the period shown",
                  "Reservations that ended unheard of: clients left while they waited in the queue, which nobody "
                  "notices before they are placed; or a replica died with them, or its reports were lost.",
                  COUNT, Query(f"sum({increase(LEASE_EXPIRATIONS)})", "leases"), width=6,
                  steps=((None, GREEN), (1, ORANGE))),
            value("Reports ignored, in the period shown",
                  "Duplicate, overtaken by a later one, or of an engine that is gone. A few at restarts are normal.",
                  COUNT, Query(f"sum({increase(REPORTS_IGNORED)})", "reports"), width=6),
        )),
        Row("Failures", (
            lines(
                "Retries and probes per second",
                "Retries: a replica failed before the first byte of its answer and the request went to another. "
                "Probes: a silent replica was asked for a report.",
                PER_SECOND,
                Query(f"sum({rate(RETRIES)})", "retries"),
                Query(f"sum({rate(PROBES)})", "probes"),
                width=8,
            ),
            lines(
                "Restarts of the coordinator",
                "In the last hour. While it is away requests flow, placed without regard to headroom.",
                COUNT, Query(f"sum(changes({series(COORDINATOR_START)}[1h]))", "restarts"), width=8,
            ),
            lines(
                "Replicas that report against replicas wanted",
                "Wanted: what autoscaling, or else the settings, ask for. Fewer for long: replicas do not start.",
                COUNT,
                Query(f"sum({series(FRESH)})", "report"),
                Query(f"sum({series(DRAINING)})", "drain"),
                Query(f"max({series(WANTED_REPLICAS)})", "wanted"),
                width=8,
            ),
        )),
        Row("Placement", (
            lines(
                "Placements per second, by reason",
                "The placement policy that decided; without_coordinator counts requests that the router had to "
                "place alone because the coordinator did not answer.",
                PER_SECOND, Query(f"sum by (reason) ({rate(PLACEMENTS)})", "{{reason}}"), width=8,
            ),
            lines("Placements per second, by replica", "Who gets the requests.",
                  PER_SECOND, Query(f"sum by (replica) ({rate(PLACEMENTS)})", "{{replica}}"), width=8),
            bars(
                "Share of placements in the period shown, by replica",
                "Equal replicas get about equal shares under equal requests.",
                Query(f"sum by (replica) ({increase(PLACEMENTS)}) / scalar(sum({increase(PLACEMENTS)}))",
                      "{{replica}}"),
                ((None, GREEN),), width=8,
            ),
        )),
        Row("Truth of the ledger", (
            lines(
                "Report age by replica",
                "A saw-tooth below heartbeat_seconds is healthy; a line that climbs is a replica that went silent.",
                SECONDS, Query(series(REPORT_AGE), "{{replica}}"),
            ),
            lines(
                "Ledger drift by replica, share of the pool",
                "Held blocks that no reservation explains. Above 0 for long: requests reach the engine past the "
                "coordinator. Below 0: requests share prefix blocks, which is fine.",
                RATIO, Query(f"{series(DRIFT_BLOCKS)} / {series(TOTAL_BLOCKS)}", "{{replica}}"),
            ),
            lines("Ledger drift by replica, blocks", "The same in blocks.",
                  BLOCKS, Query(series(DRIFT_BLOCKS), "{{replica}}")),
            lines(
                "Booked against reported requests",
                "Reservations of the ledger, and sequences that the engines run or hold back. Requests with several "
                "sequences count once on the left.",
                COUNT,
                Query(series(RESERVATIONS), "booked on {{replica}}"),
                Query(f"{series(RUNNING)} + {series(WAITING)}", "reported by {{replica}}"),
            ),
        )),
    )  # fmt: skip
