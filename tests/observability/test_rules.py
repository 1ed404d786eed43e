"""Rules, alerts and exposition by Prometheus' own tools."""

import re
import subprocess

import pytest

from dashboards.files import RULES
from tests.observability.fake_fleet import FakeFleet
from tests.observability.queries import RULES_TEST, metric_names, panel_queries, rules, unit_tested_rules
from tests.observability.test_dashboards import EXPOSED

RECORDED = {rule["record"] for rule in rules() if "record" in rule}
ALERTS = [rule for rule in rules() if "alert" in rule]


def run(*command, stdin=None):
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


def test_promtool_accepts_the_rules(promtool):
    code, output = run(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert code == 0, output


def test_promtools_unit_tests_of_the_rules_pass(promtool):
    code, output = run(promtool, "test", "rules", str(RULES_TEST))
    assert code == 0, output


def test_a_changed_threshold_fails_promtools_unit_tests(promtool, tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES.read_text().replace("ratio < 0.05", "ratio < 0.06"))
    relative = "../../dashboards/rules/trifleet.rules.yaml"
    (tmp_path / "test.yaml").write_text(RULES_TEST.read_text().replace(relative, "rules.yaml"))
    code, output = run(promtool, "test", "rules", str(tmp_path / "test.yaml"))
    assert code != 0
    assert "TrifleetHeadroomLow" in output


def test_every_rule_and_every_alert_is_unit_tested():
    assert unit_tested_rules() == RECORDED | {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_ask_for_metrics_that_exist(rule):
    assert metric_names(rule["expr"]) <= EXPOSED | RECORDED


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_say_how_bad_what_and_what_it_means(rule):
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}


def test_promtool_finds_nothing_wrong_with_the_exposition(promtool):
    code, output = run(promtool, "check", "metrics", stdin=FakeFleet().metrics())
    assert (code, output) == (0, "")


def test_promtool_would_find_a_metric_without_help(promtool):
    code, _ = run(promtool, "check", "metrics", stdin=b"# TYPE trifleet_x gauge\ntrifleet_x 1\n")
    assert code != 0


def test_the_panel_of_headroom_is_what_its_alert_looks_at():
    (panel,) = (query for query in panel_queries() if "Headroom, share of the pools" in query.where)
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    headroom, _, pools = re.sub(r"\{.*?\}", "", panel.expr).partition(" / ")
    rule = recorded["model:trifleet_headroom_blocks:sum"].replace("sum by (cluster, model) ", "sum")
    assert headroom == rule.replace("replica:trifleet_placeable:bool", recorded["replica:trifleet_placeable:bool"])
    ratio = recorded["model:trifleet_headroom:ratio"]
    assert pools == ratio.partition("/")[2].strip().replace("sum by (cluster, model) ", "sum")
