"""What all dashboards share: variables, links to each other, refresh, and rows of panels with numbered ids."""

from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from dashboards.panels import DATASOURCE, PanelBuilder
from dashboards.promql import VARIABLES
from deploy.metrics import ADMISSIONS, TOTAL_BLOCKS

TAG = "trifleet"


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[PanelBuilder, ...]


def board(uid: str, title: str, description: str, *rows: Row) -> Dashboard:
    """`uid` is the dashboard's identity in Grafana, so links and pushes keep working: never change it."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(_links())
        .with_variable(dashboard.DatasourceVariable("datasource").label("Datasource").type("prometheus"))
    )
    for label in VARIABLES:
        made.with_variable(_variable(label))
    number = 0
    for row in rows:
        number += 1
        made.with_row(dashboard.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            made.with_panel(panel.id(number))
    built = made.build()
    for link in built.links or []:
        link.placement = None  # type: ignore[assignment]  # the SDK's default hides links in a menu
    return built


def _variable(label: str) -> dashboard.QueryVariable:
    """The label's values under what is chosen in the variables before it: one model, any clusters, replicas, tiers."""
    metric = ADMISSIONS if label == "tier" else TOTAL_BLOCKS
    before = list(VARIABLES)[: list(VARIABLES).index(label)]
    chosen = [VARIABLES[other] for other in before if other in ("cluster", *metric.labels)]
    selector = f"{metric.name}{{{', '.join(chosen)}}}" if chosen else metric.name
    query = f"label_values({selector}, {label})"
    variable = (
        dashboard.QueryVariable(label)
        .label(label.capitalize())
        .datasource(DATASOURCE)
        .query({"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .definition(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )
    if label == "model":
        return variable.multi(False).include_all(False)
    everything = VariableOption(selected=True, text=["All"], value=["$__all"])
    return variable.multi(True).include_all(True).all_value(".*").current(everything)


def _links() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("Fleet dashboards").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.as_dropdown(False).include_vars(True).keep_time(True)
