"""The tables of docs/performance.md are those of the result files."""

import json
from pathlib import Path

import pytest

from benchmarks.tables import PAGE, RESULTS, TABLES, renewed


def test_the_page_shows_the_result_files_as_they_are() -> None:
    page = PAGE.read_text()
    assert renewed(page) == page, "run `python -m benchmarks.tables`"
    for name in TABLES:
        assert (RESULTS / f"{name}.json").exists()


def test_a_new_result_changes_its_own_table_alone(tmp_path: Path) -> None:
    figures = json.loads((RESULTS / "start.json").read_text())
    figures["parts"]["a part of its own"] = 12.3
    (tmp_path / "start.json").write_text(json.dumps(figures))
    before, after = PAGE.read_text().splitlines(), renewed(PAGE.read_text(), tmp_path).splitlines()
    assert set(after) - set(before) == {"| a part of its own | 12.3 |"}


def test_a_page_without_the_place_for_a_table_is_named() -> None:
    with pytest.raises(ValueError, match="<!-- engine -->"):
        renewed("# Performance")
