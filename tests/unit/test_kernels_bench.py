"""The benchmarks' figures at a small size: what they claim holds, and the commands write them down."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import compaction
from benchmarks.cli import app


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "LAYERS", 2)
    monkeypatch.setattr(compaction, "REPEATS", 2)


def test_bench_compaction_moves_a_fraction_of_a_slide_and_scores_as_fp64_does(tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "out.json"
    result = CliRunner().invoke(app, ["compaction", "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert figures["score_bytes_read"] == 2 * 8 * 2176 * 128 * 2
    assert 0 < figures["bytes_moved"] <= 2 * 8 * 128 * 2 * 128 * 2
    assert figures["bytes_moved_full_slide"] >= 8 * figures["bytes_moved"]
    assert figures["collapsed_vs_17_offsets_max_relative_error"] < 1e-4
    assert figures["score_over_copy"] > 0
    assert figures["compact_over_copy"] > 0


def test_bench_eviction_frees_the_evicted_blocks_with_compaction_only() -> None:
    figures = compaction.bench_eviction(live=2048, layers=2)
    for sets in figures["keys"].values():
        assert all(0.88 < blocks["share_freed_with_compaction"] <= 0.9 for blocks in sets.values())
        assert sets["per_layer_per_head"]["share_freed_without_compaction"] < 0.1
    assert figures["keys"]["independent"]["per_head"]["share_freed_without_compaction"] < 0.1
