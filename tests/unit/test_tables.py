"""The tables of the pages are those of the result files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.tables import DOCS, PAGES, RESULTS, renewed

PAGE = DOCS / "performance.md"
TABLES = PAGES[PAGE]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_shows_the_result_files_as_they_are(path: Path) -> None:
    page = path.read_text()
    assert renewed(page, PAGES[path]) == page, "run `python -m benchmarks.tables`"
    for name in PAGES[path]:
        assert f"<!-- {name} -->" in page


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_result_names_no_folder_of_the_machine_that_made_it(file: Path) -> None:
    assert re.findall(r"(?<![\w.])/\w[\w.-]*/[\w./-]+", file.read_text()) == []


def test_a_new_result_changes_its_own_table_alone(tmp_path: Path) -> None:
    page = PAGE.read_text()
    parts = {"Ray": 4.56, "engines": 12.3}
    (tmp_path / "start.json").write_text(json.dumps({"cores": 3, "vllm": "1.2", "seconds": 16.9, "parts": parts}))
    after = renewed(page, TABLES, tmp_path)
    before_table, table = after.split("<!-- start -->\n")[0], after.split("<!-- start -->\n")[1].split("<!--")[0]
    assert table.splitlines() == [
        "| part | seconds |",
        "| --- | ---: |",
        "| Ray | 4.6 |",
        "| engines | 12.3 |",
        "| **altogether** | **16.9** |",
        "",
        "3 cores; vllm 1.2",
    ]
    assert before_table == page.split("<!-- start -->")[0]
    assert after.split("<!-- /start -->")[1] == page.split("<!-- /start -->")[1]


def test_a_page_without_the_place_for_a_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(ValueError, match="<!-- engine -->"):
        renewed("# Performance", TABLES, tmp_path)
