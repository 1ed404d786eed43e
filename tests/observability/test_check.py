"""The check against a real Prometheus, developed on the fake fleet; `make observability-check` uses the real one."""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from dashboards.promql import interpolated
from tests.observability import check, debian
from tests.observability.check import ask_everything, has_data
from tests.observability.fake_fleet import MODEL, fake_fleet_server
from tests.observability.queries import Asked, panel_queries

VALUES = {
    "$__rate_interval": "10s", "$__range": "12s", "$cluster": ".*", "$model": MODEL, "$replica": ".*", "$tier": ".*",
}  # fmt: skip


def test_every_query_has_data_or_a_reason(watched):
    result = ask_everything(*watched)
    assert result.empty == []
    assert result.queries == result.queries_with_data + result.queries_explained
    assert (result.panels, result.rules_tested) > (40, 10)
    assert all(query.startswith("alert ") for query in result.explained), "under load every panel draws something"


def test_prometheus_evaluates_all_rules_without_error(watched):
    server, *_ = watched
    rules = [rule for group in server.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    assert {rule["health"] for rule in rules} == {"ok"}


def test_every_label_of_a_legend_is_in_the_series(watched):
    server, _, end = watched
    for query in panel_queries():
        for series in server.query(interpolated(query.expr, VALUES), end):
            for label in re.findall(r"{{(\w+)}}", query.legend):
                assert label in series["metric"], query.where


@pytest.mark.parametrize(
    "expr", ["trifleet_no_such_metric", 'trifleet_free_blocks{model="no such model"}', "vector(0) / 0"]
)
def test_no_series_and_nothing_but_nan_count_as_empty(watched, expr):
    server, start, end = watched
    assert not has_data(server, Asked("panel", "test", expr), VALUES, start, end)


def test_a_query_that_prometheus_refuses_is_an_error_and_not_an_empty_panel(watched):
    server, start, end = watched
    with pytest.raises(AssertionError, match="does not run rate"):
        has_data(server, Asked("panel", "test", "rate(trifleet_free_blocks)"), VALUES, start, end)


def test_without_prometheus_and_the_right_to_install_it_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(debian.ProgramMissing, match=r"is not on the PATH .* apt-get install prometheus"):
        debian.tool.__wrapped__("prometheus", "prometheus")


def test_two_workers_that_miss_a_program_install_it_one_after_the_other(monkeypatch, tmp_path):
    """As apt-get, this one fails where another one runs."""
    apt, lock, program = tmp_path / "apt-get", tmp_path / "lock", tmp_path / "made-by-apt"
    apt.write_text(
        f"#!/bin/sh\nmkdir {lock} || exit 100\nsleep 0.2\necho '#!/bin/sh' > {program}\n"
        f"[ $2 = update ] || chmod +x {program}\nrmdir {lock}\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(debian.os, "geteuid", lambda: 0)
    monkeypatch.setattr(debian, "LOCK", tmp_path / "workers.lock")
    with ThreadPoolExecutor(2) as workers:
        found = list(workers.map(lambda _: debian.tool.__wrapped__(program.name, "some-package"), range(2)))
    assert found == [str(program)] * 2


def test_a_replica_that_never_compacts_fails_the_check(watched, tmp_path, monkeypatch, capsys):
    """The command line, against a fleet whose engines say nothing of their compactions."""
    from tests.observability import fake_fleet

    whole = fake_fleet.render

    def without_compactions(snapshot, model):
        lines = whole(snapshot, model).splitlines(keepends=True)
        return b"".join(line for line in lines if b"triattention_compactions_total" not in line)

    monkeypatch.setattr(fake_fleet, "render", without_compactions)
    with fake_fleet_server() as url:
        arguments = ["check", "--url", url, "--seconds", "4", "--json", str(tmp_path / "observability.json")]
        monkeypatch.setattr(sys, "argv", arguments)
        assert check.main() == 1
    written = json.loads((tmp_path / "observability.json").read_text())
    assert set(written) == set(asdict(check.Observability(0, 0, 0, 0, 0, 0)))
    missing = [query for query in written["empty"] if "triattention_compactions_total" in query]
    assert len(missing) == 4
    assert "empty: panel Compaction / Compactions, A: " in capsys.readouterr().out
