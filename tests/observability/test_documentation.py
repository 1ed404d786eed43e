"""docs/observability.md against the code: every metric, every alert, panels that do show what they are said to."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dashboards.files import RULES
from deploy.metrics import METRICS
from tests.observability.queries import exported_dashboards, panels_of, rules

TEXT = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
TYPES = {metric.name: metric.kind for metric in METRICS}
PANELS = {
    f"{dashboard['title']} / {panel['title']}": panel
    for dashboard in exported_dashboards()
    for panel in panels_of(dashboard)
}


def table(heading):
    """Rows of the section's table, cells stripped of their marks."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_every_metric_once_in_the_order_of_the_module():
    assert [row[0] for row in table("Metrics")] == list(TYPES)


@pytest.mark.parametrize("row", table("Metrics"), ids=lambda row: row[0])
def test_type_and_panel_of_a_metric_are_as_documented(row):
    name, kind, meaning, panel, remedy = row
    assert kind == TYPES[name]
    assert meaning
    assert remedy
    assert any(name in target["expr"] for target in PANELS[panel]["targets"])


def test_the_table_has_every_alert_with_its_severity():
    alerts = [[rule["alert"], rule["labels"]["severity"]] for rule in rules() if "alert" in rule]
    assert [row[:2] for row in table("Alerts")] == alerts


def test_the_dashboards_are_those_that_exist():
    assert [row[0] for row in table("Dashboards and alerts")] == [d["title"] for d in exported_dashboards()]


def test_prometheus_accepts_the_configuration_shown(promtool, tmp_path):
    shutil.copy(RULES, tmp_path)
    config = tmp_path / "prometheus.yml"
    config.write_text(TEXT.split("```yaml\n")[1].split("```")[0])
    done = subprocess.run([promtool, "check", "config", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
