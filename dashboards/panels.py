"""The kinds of panels that the dashboards use, in one look: time series, single values, bars, heat maps.

Every panel reads the datasource that the dashboard's variable names, says in its description what it shows and
what to do about it, and is built with the Grafana Foundation SDK.
"""

from dataclasses import dataclass
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    DataSourceRef,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import DynamicConfigValue, FieldColorModeId, Threshold, ThresholdsMode
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.promql import checked

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

# Grafana's units.
BLOCKS = COUNT = "locale"
BYTES = "bytes"
BYTES_PER_SECOND = "Bps"
PER_MINUTE = "opm"
PER_SECOND = "ops"
RATIO = "percentunit"
SECONDS = "s"
JOULES = "joule"
WATTS = "watt"

GREEN, ORANGE, RED, BLUE, PURPLE, GREY = "green", "orange", "red", "blue", "purple", "#8e8e8e"

Steps = tuple[tuple[float | None, str], ...]
"""Colour from this value on; the first has no value and holds below all others."""

PanelBuilder = timeseries.Panel | stat.Panel | bargauge.Panel | heatmap.Panel
_Panel = TypeVar("_Panel", timeseries.Panel, stat.Panel, bargauge.Panel, heatmap.Panel)


@dataclass(frozen=True)
class Query:
    """An expression and the legend of its series, with labels as `{{label}}`."""

    expr: str
    legend: str


def lines(title: str, description: str, unit: str, *queries: Query, width: int = 12) -> timeseries.Panel:
    """One line per series, from zero."""
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = (
        _panel(timeseries.Panel(), title, description, unit, width, height=8)
        .legend(legend.show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .fill_opacity(8)
        .line_width(2)
        .show_points(VisibilityMode.NEVER)
        .axis_soft_min(0)
    )
    return _with_queries(panel, queries, instant=False)


def stacked(
    title: str, description: str, unit: str, colours: dict[str, str], *queries: Query, line: Query, width: int = 12
) -> timeseries.Panel:
    """Areas on top of each other, by legend in the given colours, under one dashed line that they add up to."""
    panel = lines(title, description, unit, *queries, line, width=width)
    panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A")).fill_opacity(60).line_width(0)
    for legend, colour in colours.items():
        panel.override_by_name(legend, [_property("color", {"mode": "fixed", "fixedColor": colour})])
    panel.override_by_name(
        line.legend,
        [
            _property("custom.stacking", {"mode": "none", "group": "A"}),
            _property("custom.fillOpacity", 0),
            _property("custom.lineWidth", 2),
            _property("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
            _property("color", {"mode": "fixed", "fixedColor": "text"}),
        ],
    )
    return panel


def value(
    title: str, description: str, unit: str, query: Query, *, width: int = 4, steps: Steps = ((None, BLUE),)
) -> stat.Panel:
    """The value now, large, with its series' name where the legend names one by label."""
    name_it = BigValueTextMode.VALUE_AND_NAME if "{{" in query.legend else BigValueTextMode.VALUE
    panel = (
        _panel(stat.Panel(), title, description, unit, width, height=4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .text_mode(name_it)
        .graph_mode(BigValueGraphMode.NONE)
        .color_mode(BigValueColorMode.VALUE)
        .thresholds(_thresholds(steps))
    )
    if unit == COUNT:
        panel.decimals(0)  # an increase is extrapolated to the ends of the period, so it is not whole
    return _with_queries(panel, (query,), instant=True)


def bars(title: str, description: str, query: Query, steps: Steps, width: int = 12) -> bargauge.Panel:
    """Shares between 0 and 1 now, one bar per series."""
    panel = (
        _panel(bargauge.Panel(), title, description, RATIO, width, height=8)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .orientation(VizOrientation.HORIZONTAL)
        .display_mode(BarGaugeDisplayMode.BASIC)
        .min(0)
        .max(1)
        .thresholds(_thresholds(steps))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    )
    return _with_queries(panel, (query,), instant=True)


def heat(title: str, description: str, unit: str, query: Query, width: int = 12) -> heatmap.Panel:
    """A histogram's buckets over time."""
    # All of them: what is left out the SDK writes as 0, and a palette of 0 steps draws nothing.
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    colours.scale(HeatmapColorScale.EXPONENTIAL).exponent(0.5).fill("dark-orange")
    panel = (
        _panel(heatmap.Panel(), title, description, COUNT, width, height=8)
        .calculate(False)
        .color(colours)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .cell_gap(1)
    )
    target = _target(query, "A").range().format(PromQueryFormat.HEATMAP)
    return panel.with_target(target)


def _panel(panel: _Panel, title: str, description: str, unit: str, width: int, height: int) -> _Panel:
    return panel.title(title).description(description).unit(unit).datasource(DATASOURCE).span(width).height(height)


def _with_queries(panel: _Panel, queries: tuple[Query, ...], *, instant: bool) -> _Panel:
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        target = _target(query, letter)
        panel.with_target(target.instant() if instant else target.range())
    return panel


def _target(query: Query, letter: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(letter).expr(checked(query.expr)).legend_format(query.legend)
    return target.datasource(DATASOURCE)


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    made = [Threshold(value=start, color=colour) for start, colour in steps]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


def _property(name: str, setting: object) -> DynamicConfigValue:
    return DynamicConfigValue(id_val=name, value=setting)
