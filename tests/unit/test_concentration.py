"""The mean resultant length per head, of the dominant band and over all bands, and the command that reports it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from deploy.cli import app
from tests.unit.test_calibration import TEXT, save_model
from tests.unit.test_upstream import upstream_file
from tests.unit.tiny_models import llama, qwen3, random_statistics
from triattention.concentration import Concentration
from triattention.statistics import QueryStatistics


def test_figures_equal_the_formula_written_out() -> None:
    statistics = random_statistics(llama())
    found = Concentration.of(statistics)
    for layer in range(3):
        for head in range(4):
            mean = statistics.query_mean[layer, head].abs().tolist()
            magnitude = statistics.query_magnitude[layer, head].tolist()
            lengths = [m / a for m, a in zip(mean, magnitude, strict=True)]
            strongest = max(range(8), key=magnitude.__getitem__)
            assert found.dominant[layer, head] == pytest.approx(lengths[strongest])
            weighted = sum(a * a * r for a, r in zip(magnitude, lengths, strict=True)) / sum(a * a for a in magnitude)
            assert found.weighted[layer, head] == pytest.approx(weighted)


def test_one_direction_gives_one_and_no_queries_give_zero() -> None:
    statistics = random_statistics(llama())
    magnitude = statistics.query_mean.abs()
    magnitude[0, 0] = 0
    still = replace(statistics, query_mean=statistics.query_mean * (magnitude > 0), query_magnitude=magnitude)
    found = Concentration.of(still)
    assert found.dominant[0, 0] == found.weighted[0, 0] == 0
    assert torch.allclose(found.dominant[1:], torch.ones(2, 4))
    assert torch.allclose(found.weighted[1:], torch.ones(2, 4))


def test_the_command_measures_tells_and_draws(tmp_path: Path) -> None:
    save_model(tmp_path / "model", qwen3())
    (tmp_path / "text").write_text("\n".join(TEXT))
    out, picture, figures = tmp_path / "out.safetensors", tmp_path / "a" / "heat.png", tmp_path / "b" / "heads.json"
    result = CliRunner().invoke(
        app,
        ["calibrate", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--out", str(out),
         "--heatmap", str(picture), "--json", str(figures)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "22 tokens" in result.output
    found = Concentration.of(QueryStatistics.load(out, qwen3()))
    written = json.loads(figures.read_text())
    assert written["tokens"] == 22
    assert len(written["heads"]) == 12
    assert written["heads"][5] == {
        "layer": 1, "head": 1,
        "dominant": pytest.approx(float(found.dominant[1, 1])), "weighted": pytest.approx(float(found.weighted[1, 1])),
    }  # fmt: skip
    pixels = imread(picture)
    assert pixels.shape[0] > 200
    assert pixels[..., :3].std() > 0.05
    layer_two = next(line for line in result.output.splitlines() if line.strip().startswith("2 "))
    assert [int(word) for word in layer_two.split()[1:5]] == (100 * found.dominant[2]).round().int().tolist()


def test_the_command_imports_and_refuses_in_a_sentence(tmp_path: Path) -> None:
    save_model(tmp_path / "model", qwen3())
    file = upstream_file(tmp_path / "stats.pt", random_statistics(qwen3()))
    out = tmp_path / "out.safetensors"
    command = ["calibrate", "--model", str(tmp_path / "model"), "--import", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert torch.equal(QueryStatistics.load(out, qwen3()).query_mean, random_statistics(qwen3()).query_mean)

    both = CliRunner().invoke(app, [*command, "--text", str(file)])
    assert both.exit_code == 1
    assert both.output.split() == ["--text", "and", "--import", "are", "both", "set:", "keep", "one", "of", "them"]
    missing = CliRunner().invoke(app, ["calibrate", "--model", str(tmp_path / "no"), "--out", str(out)])
    assert missing.exit_code == 1
    assert "no config that transformers knows can be read there" in " ".join(missing.output.split())
