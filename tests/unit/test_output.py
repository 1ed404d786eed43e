"""Files that commands are to write: a path that cannot be is refused before any work, in a sentence."""

import json
import os
import shutil
import subprocess

import pytest
import yaml
from typer.testing import CliRunner

from deploy.cli import app

PLAN = ["plan", "qwen3-8b", "--gpu-gib", "40", "--json"]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_the_folder_of_a_file_is_made(tmp_path):
    file = tmp_path / "new" / "deep" / "plan.json"
    result = run(*PLAN, str(file))
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())


@pytest.mark.parametrize(
    "command",
    [
        PLAN,
        ["demo", "--json"],
        ["status", "--json"],
        ["doctor", "--model", "x", "--json"],
        ["evaluate", "--json"],
        ["bench", "router", "--json"],
        ["keys", "new", "--file"],
        ["calibrate", "--model", "x", "--out"],
    ],
)
@pytest.mark.parametrize(("name", "sentence"), [("/proc/x.json", "cannot be written"), ("{tmp_path}", "is a folder")])
def test_what_cannot_be_written_is_told_before_the_work(tmp_path, command, name, sentence):
    result = run(*command, name.format(tmp_path=tmp_path))
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())
    assert "Key (shown" not in result.output


@pytest.mark.parametrize("name", ["/proc/plots", "{tmp_path}/file", "{tmp_path}/file/plots"])
def test_a_folder_for_plots_that_cannot_be_is_told_before_the_work(tmp_path, name):
    (tmp_path / "file").touch()
    result = run("evaluate", "--task", "nothing", "--plots", name.format(tmp_path=tmp_path))
    assert result.exit_code == 2
    assert "--plots" in result.output


def test_a_file_that_is_there_and_cannot_be_written_is_told_before_the_work(tmp_path):
    """A program that runs: even its owner and root cannot write to it."""
    program = tmp_path / "plan.json"
    shutil.copy(shutil.which("sleep"), program)
    running = subprocess.Popen([program, "600"])
    try:
        result = run(*PLAN, str(program))
    finally:
        running.kill()
        running.wait()
    assert result.exit_code == 2
    assert "plan.json cannot be written: Text file busy" in " ".join(result.output.split())


def test_a_file_that_is_there_stays_as_it_is_until_there_are_figures(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("kept")
    assert run("plan", "nowhere", "--gpu-gib", "40", "--json", str(file)).exit_code == 1
    assert file.read_text() == "kept"


def test_figures_go_to_a_pipe_whose_folder_takes_no_files(tmp_path):
    read, write = os.pipe()
    result = run(*PLAN, f"/dev/fd/{write}")
    os.close(write)
    with open(read) as pipe:
        assert (result.exit_code, json.load(pipe)["model"]["name"]) == (0, "qwen3-8b"), result.output


@pytest.mark.parametrize("text", [None, "a: [", "\t"])
def test_settings_that_cannot_be_read_are_a_sentence_of_k8s_render_too(tmp_path, text):
    file = tmp_path / "fleet.yaml"
    if text is not None:
        file.write_text(text)
    result = run("k8s", "render", "-f", str(file), "--out", str(tmp_path / "generated"))
    assert result.exit_code == 1
    assert str(file) in result.output.replace("\n", "")
    assert not isinstance(result.exception, (OSError, yaml.YAMLError))


def test_imported_statistics_do_not_go_into_the_models_folder_either(tmp_path):
    result = run("calibrate", "--model", str(tmp_path), "--import", "up.pt", "--out", str(tmp_path / "s.safetensors"))
    assert result.exit_code == 1
    assert "load it as weights" in result.output.replace("\n", " ")


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence_by_dashboards_export():
    result = run("dashboards", "export", "/proc/foo")
    assert result.exit_code == 1
    assert "/proc/foo cannot be written to (No such file or directory): name another folder." in result.output


def test_a_keys_file_that_is_no_text_is_refused_before_a_key_is_made(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xff\xfe")
    result = run("keys", "new", "--file", str(file))
    assert result.exit_code == 1
    assert "is no text in UTF-8: name a keys file" in result.output
    assert "Key (shown" not in result.output
    assert file.read_bytes() == b"\xff\xfe"


def test_a_price_of_power_without_the_power_is_refused_by_name():
    result = run("plan", "qwen3-8b", "--gpu-gib", "40", "--price-kwh", "0.3")
    assert result.exit_code == 1
    assert "--price-kwh is 0.3, but --watts is not set" in result.output
