"""PromQL as text: selectors filtered by the dashboards' variables, and the few functions that panels need.

Takes metrics from `deploy.metrics`, never a name as a string: a renamed metric is a type error here, and a
function applied to the wrong kind of metric is an assertion. Every expression is parsed when a panel is built.
"""

import promql_parser

from deploy.metrics import Descriptor

# Label of a series -> the matcher that follows the dashboards' variable. `cluster` is not ours: whoever scrapes
# several fleets into one Prometheus puts it on, and its variable matches series without it, too. One model at a
# time: blocks of different models are of different sizes, so their sums would mean nothing.
VARIABLES = {
    "cluster": 'cluster=~"$cluster"',
    "model": 'model="$model"',
    "replica": 'replica=~"$replica"',
    "tier": 'tier=~"$tier"',
}

# What Grafana puts in for its own variables; here for parsing, and for running a panel's query without Grafana.
SAMPLE_VALUES = {
    "$__rate_interval": "1m",
    "$__range": "1h",
    "$cluster": ".*",
    "$model": "model",
    "$replica": ".*",
    "$tier": ".*",
}


def checked(expr: str) -> str:
    """The expression itself. Raises ValueError if it is not PromQL or names a variable that no dashboard has."""
    try:
        promql_parser.parse(interpolated(expr, SAMPLE_VALUES))
    except ValueError as error:
        raise ValueError(f"{expr} is not PromQL: {error}") from None
    return expr


def interpolated(expr: str, values: dict[str, str]) -> str:
    """As Grafana sends it to Prometheus."""
    for variable, value in values.items():
        expr = expr.replace(variable, value)
    if "$" in expr:
        raise ValueError(f"{expr} has a variable that is not one of {', '.join(values)}")
    return expr


def series(metric: Descriptor, **matchers: str) -> str:
    """The metric's series of the chosen cluster, model, replica and tier: `name{cluster=~"$cluster", ...}`."""
    return _select(metric.name, metric, matchers)


def rate(metric: Descriptor, **matchers: str) -> str:
    """Per second; the window follows the zoom and is never shorter than four scrapes."""
    assert metric.kind == "counter", f"{metric.name} is a {metric.kind}: it has no rate"
    return f"rate({series(metric, **matchers)}[$__rate_interval])"


def increase(metric: Descriptor, **matchers: str) -> str:
    """Over the period that the dashboard shows. Restarts of an engine are accounted for."""
    assert metric.kind == "counter", f"{metric.name} is a {metric.kind}: it has no increase"
    return f"increase({series(metric, **matchers)}[$__range])"


def bucket_rate(metric: Descriptor, by: str) -> str:
    """Observations per second and bucket of a histogram."""
    assert metric.kind == "histogram", f"{metric.name} is a {metric.kind}: it has no buckets"
    return f"sum by ({by}) (rate({_select(f'{metric.name}_bucket', metric, {})}[$__rate_interval]))"


def rate_of_sum(metric: Descriptor, by: str) -> str:
    """Of what a histogram observed, per second."""
    assert metric.kind == "histogram", f"{metric.name} is a {metric.kind}: it has no sum"
    return f"sum by ({by}) (rate({_select(f'{metric.name}_sum', metric, {})}[$__rate_interval]))"


def quantile(share: float, metric: Descriptor, by: str) -> str:
    return f"histogram_quantile({share:g}, {bucket_rate(metric, f'{by}, le')})"


def mean(metric: Descriptor, by: str) -> str:
    """Of a histogram's observations. No value where there were none."""
    assert metric.kind == "histogram", f"{metric.name} is a {metric.kind}: it has no sum and count"
    total, count = (f"sum by ({by}) (rate({_select(f'{metric.name}_{part}', metric, {})}[$__rate_interval]))"
                    for part in ("sum", "count"))  # fmt: skip
    return f"{total} / {count}"


def _select(name: str, metric: Descriptor, matchers: dict[str, str]) -> str:
    known = ("cluster", *metric.labels)
    filters = [matcher for label, matcher in VARIABLES.items() if label in known]
    filters += [f'{label}="{value}"' for label, value in matchers.items()]
    return f"{name}{{{', '.join(filters)}}}"
