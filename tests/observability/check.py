"""Runs every query of every panel, variable, rule and alert against a fleet's metrics in a real Prometheus.

    python -m tests.observability.check --url http://127.0.0.1:8000/metrics --seconds 60 --json observability.json

A load must run meanwhile: a panel that stays empty under load is a defect. What may be empty is listed here,
each with its reason.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dashboards.promql import interpolated
from tests.observability.debian import ProgramMissing
from tests.observability.prometheus import Prometheus, running_prometheus
from tests.observability.queries import (
    Asked,
    exported_dashboards,
    panel_queries,
    panels_of,
    rule_queries,
    unit_tested_rules,
    variable_queries,
)

STEP_SECONDS = 1
# Scraped once a second: windows of ten scrapes.
RATE_WINDOW_SECONDS = 10

# Why no series is right, in a fleet that serves a load.
NEEDS_A_GPU = "the fleet has no GPU that NVML shows; tests/observability asks the same of a fake fleet that has"
SILENT_ALERT = "does not fire, as it should; what it compares has data (see its operands)"


@dataclass
class Observability:
    """What came of the check: counts, and what stands behind those that are not good."""

    panels: int
    queries: int
    queries_with_data: int
    queries_explained: int
    queries_empty: int
    rules_tested: int
    explained: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)


def check(metrics_url: str, seconds: float) -> Observability:
    """Watch the address for so long, then ask everything about that time."""
    with running_prometheus(metrics_url, STEP_SECONDS) as prometheus:
        began = time.time()
        time.sleep(seconds)
        return ask_everything(prometheus, began, time.time())


def ask_everything(prometheus: Prometheus, start: float, end: float) -> Observability:
    models = prometheus.query("group by (model) (last_over_time(trifleet_total_blocks[1h]))", end)
    values = {
        "$__rate_interval": f"{RATE_WINDOW_SECONDS}s",
        "$__range": f"{math.ceil(end - start)}s",
        "$cluster": ".*",
        "$model": models[0]["metric"]["model"] if models else "",
        "$replica": ".*",
        "$tier": ".*",
    }
    queries = [*panel_queries(), *variable_queries(), *rule_queries()]
    answered = {query: has_data(prometheus, query, values, start, end) for query in queries}
    with_data = [query for query in queries if answered[query]]
    silent = {query.where for query in queries if query.kind == "alert operand" and not answered[query]}
    has_gpus = bool(prometheus.query("last_over_time(triattention_gpus[1h])", end))
    explained, empty = {}, []
    for query in queries:
        if answered[query]:
            continue
        reason = NEEDS_A_GPU if "triattention_gpu" in query.expr and not has_gpus else None
        if query.kind == "alert" and query.where not in silent:
            reason = SILENT_ALERT
        if reason is None:
            empty.append(str(query))
        else:
            explained[str(query)] = reason
    return Observability(
        panels=sum(len(panels_of(dashboard)) for dashboard in exported_dashboards()),
        queries=len(queries),
        queries_with_data=len(with_data),
        queries_explained=len(explained),
        queries_empty=len(empty),
        rules_tested=len(unit_tested_rules()),
        explained=explained,
        empty=empty,
    )


def has_data(prometheus: Prometheus, query: Asked, values: dict[str, str], start: float, end: float) -> bool:
    """Was there ever a number to draw? A series of NaN alone draws nothing.

    At any moment, also for what Grafana asks of the last one only: on a busy machine a scrape or a rule that takes
    longer than a second leaves that one without.
    """
    expr = interpolated(query.expr, values)
    samples = [s for series in prometheus.query_range(expr, start, end, STEP_SECONDS) for s in series["values"]]
    return any(not math.isnan(float(number)) for _, number in samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="the fleet's /metrics")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to scrape before asking")
    parser.add_argument("--json", type=Path, default=Path("observability.json"), help="where to write the result")
    arguments = parser.parse_args()
    try:
        result = check(arguments.url, arguments.seconds)
    except ProgramMissing as missing:
        sys.exit(str(missing))
    arguments.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    print(
        f"{result.panels} panels, {result.queries} queries: {result.queries_with_data} with data, "
        f"{result.queries_explained} explained, {result.queries_empty} empty; {result.rules_tested} rules tested."
    )
    for query in result.empty:
        print(f"empty: {query}")
    return 1 if result.empty else 0


if __name__ == "__main__":
    sys.exit(main())
