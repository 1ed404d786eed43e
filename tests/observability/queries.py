"""Every query of every dashboard, rule and alert, read from what is shipped: the exported JSON and the rules' YAML."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import promql_parser
import yaml

from dashboards.files import EXPORTED, RULES

RULES_TEST = Path(__file__).parent / "rules_test.yaml"

Kind = Literal["panel", "variable", "recording rule", "alert", "alert operand"]


@dataclass(frozen=True)
class Asked:
    """One query. `expr` may hold Grafana's variables."""

    kind: Kind
    where: str
    """"Dashboard / Panel" and the query's letter, or the rule's name."""
    expr: str
    legend: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}: {self.expr}"


def exported_dashboards() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(EXPORTED.glob("*.json"))]


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[Asked]:
    for dashboard in exported_dashboards():
        for panel in panels_of(dashboard):
            for target in panel["targets"]:
                where = f"{dashboard['title']} / {panel['title']}, {target['refId']}"
                yield Asked("panel", where, target["expr"], target["legendFormat"])


def variable_queries() -> Iterator[Asked]:
    """`label_values(selector, label)` is Grafana's own: the selector's series that have the label stand for it."""
    for dashboard in exported_dashboards():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                call = variable["query"]["query"].removeprefix("label_values(").removesuffix(")")
                selector, label = call.rsplit(", ", 1)
                where = f"{dashboard['title']} / ${variable['name']}"
                matchers = f'{selector[:-1]}, {label}!=""}}' if selector.endswith("}") else f'{selector}{{{label}!=""}}'
                yield Asked("variable", where, f"group by ({label}) ({matchers})")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_queries() -> Iterator[Asked]:
    """Alerts stay silent in a healthy fleet, so what they compare is asked for as well."""
    for rule in rules():
        if "record" in rule:
            yield Asked("recording rule", rule["record"], rule["expr"])
            continue
        yield Asked("alert", rule["alert"], rule["expr"])
        for operand in _operands(promql_parser.parse(rule["expr"])):
            yield Asked("alert operand", rule["alert"], operand.prettify())


def unit_tested_rules() -> set[str]:
    """Names of the rules that the promtool tests ask for."""
    groups = yaml.safe_load(RULES_TEST.read_text())["tests"]
    recorded = {name for group in groups for test in group.get("promql_expr_test", []) for name in _names(test["expr"])}
    alerts = {test["alertname"] for group in groups for test in group.get("alert_rule_test", [])}
    return recorded | alerts


def metric_names(expr: str) -> set[str]:
    return set(_names(expr))


def _names(expr: str) -> Iterator[str]:
    found: list[promql_parser.Expr] = []
    promql_parser.walk(promql_parser.parse(expr), pre_visit=lambda node: found.append(node))
    for node in found:
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, f"{expr} selects series without naming a metric"
            yield node.name


_COMPARISONS = {"==", "!=", "<", ">", "<=", ">=", "and", "or", "unless"}


def _operands(expr: promql_parser.Expr) -> Iterator[promql_parser.Expr]:
    """What stands on the two sides of every comparison and set operation of an alert, constants aside."""
    if isinstance(expr, promql_parser.ParenExpr):
        yield from _operands(expr.expr)
    elif isinstance(expr, promql_parser.BinaryExpr) and str(expr.op) in _COMPARISONS:
        yield from _operands(expr.lhs)
        yield from _operands(expr.rhs)
    elif isinstance(expr, promql_parser.Call) and expr.func.name == "absent":
        yield from expr.args
    elif not isinstance(expr, promql_parser.NumberLiteral):
        yield expr
