"""The dashboards as shipped: what Grafana reads, and that it is what the code makes."""

import itertools
import re

import promql_parser
import pytest
from typer.testing import CliRunner

from dashboards.catalog import dashboards, export, to_json
from dashboards.cli import app
from dashboards.files import EXPORTED, RULES
from dashboards.panels import Query, value
from dashboards.promql import SAMPLE_VALUES, bucket_rate, interpolated, rate
from deploy.metrics import COMPACTIONS, FREE_BLOCKS, METRICS, QUEUE_WAIT
from tests.observability.queries import exported_dashboards, metric_names, panel_queries, panels_of

EXPOSED = {
    name
    for metric in METRICS
    for name in (
        [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
        if metric.kind == "histogram"
        else [metric.name]
    )
}

every_dashboard = pytest.mark.parametrize("dashboard", exported_dashboards(), ids=lambda d: d["uid"])
every_query = pytest.mark.parametrize("query", list(panel_queries()), ids=lambda q: q.where)


def test_the_exported_files_are_what_the_code_makes():
    made = {f"{dashboard.uid}.json": to_json(dashboard) for dashboard in dashboards()}
    committed = {file.name: file.read_text() for file in EXPORTED.iterdir()}
    assert committed == made, "run `trifleet dashboards export dashboards/export` and remove its rules file"


@every_query
def test_every_expression_is_promql(query):
    promql_parser.parse(interpolated(query.expr, SAMPLE_VALUES))


@every_query
def test_every_panel_asks_for_metrics_that_exist_and_not_for_recorded_ones(query):
    assert metric_names(interpolated(query.expr, SAMPLE_VALUES)) <= EXPOSED


def test_every_metric_is_on_a_panel():
    shown = {name for query in panel_queries() for name in metric_names(interpolated(query.expr, SAMPLE_VALUES))}
    assert {metric.name for metric in METRICS} <= {re.sub("_(bucket|sum|count)$", "", name) for name in shown}


@every_query
def test_every_selector_follows_the_variables_that_its_labels_know(query):
    labels = {metric.name: metric.labels for metric in METRICS}
    for name, matchers in re.findall(r"(\w+)\{(.*?)\}", query.expr):
        known = labels[re.sub("_(bucket|sum|count)$", "", name)]
        assert 'cluster=~"$cluster"' in matchers
        assert ('model="$model"' in matchers) == ("model" in known)
        assert ('replica=~"$replica"' in matchers) == ("replica" in known)
        assert ('tier=~"$tier"' in matchers) == ("tier" in known)


@every_dashboard
def test_it_imports_into_any_grafana(dashboard):
    """No id of some other Grafana, no datasource but the one that its variable names."""
    assert "id" not in dashboard
    assert "version" not in dashboard
    assert dashboard["schemaVersion"] == 42
    first, *others = dashboard["templating"]["list"]
    assert (first["type"], first["name"], first["query"]) == ("datasource", "datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert [(variable["name"], variable["datasource"]) for variable in others] == [
        ("cluster", chosen), ("model", chosen), ("replica", chosen), ("tier", chosen),
    ]  # fmt: skip
    for panel in panels_of(dashboard):
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])


@every_dashboard
def test_variables_start_at_all_but_for_the_model(dashboard):
    cluster, model, replica, tier = dashboard["templating"]["list"][1:]
    for variable in (cluster, replica, tier):
        assert (variable["includeAll"], variable["allValue"], variable["current"]["value"]) == (True, ".*", ["$__all"])
    assert (model["includeAll"], model["multi"]) == (False, False)


@every_dashboard
def test_panels_neither_overlap_nor_leave_the_grid(dashboard):
    cells = [
        (x, y)
        for box in (panel["gridPos"] for panel in dashboard["panels"])
        for x, y in itertools.product(range(box["x"], box["x"] + box["w"]), range(box["y"], box["y"] + box["h"]))
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@every_dashboard
def test_every_panel_says_what_it_shows_and_has_a_number_and_a_name_of_its_own(dashboard):
    panels = dashboard["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    titles = [panel["title"] for panel in panels_of(dashboard)]
    assert len(titles) == len(set(titles))
    assert all(panel["description"].endswith(".") for panel in panels_of(dashboard))


def test_identities_in_grafana_stay_as_they_are():
    """Links and pushes go by them: a changed one leaves the old dashboard behind."""
    assert [dashboard["uid"] for dashboard in exported_dashboards()] == [
        "trifleet-capacity", "trifleet-compaction", "trifleet-requests", "trifleet-routing",
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["sum(", "up{", 'up{replica="$pod"}', "rate(up)"])
def test_a_panel_with_a_broken_expression_cannot_be_built(wrong):
    with pytest.raises(ValueError, match=re.escape(wrong)):
        value("Broken", "Broken.", "none", Query(wrong, "broken"))


def test_a_function_on_the_wrong_kind_of_metric_cannot_be_built():
    with pytest.raises(AssertionError, match="trifleet_free_blocks is a gauge"):
        rate(FREE_BLOCKS)
    with pytest.raises(AssertionError, match="triattention_compactions_total is a counter"):
        bucket_rate(COMPACTIONS, "le")
    assert bucket_rate(QUEUE_WAIT, "le").startswith("sum by (le) (rate(trifleet_queue_wait_seconds_bucket{")


def test_the_export_command_writes_dashboards_and_rules(tmp_path):
    result = CliRunner().invoke(app, ["export", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    written = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert written == sorted([*(file.name for file in export(tmp_path / "other")), RULES.name])
    assert (tmp_path / "new" / RULES.name).read_text() == RULES.read_text()
