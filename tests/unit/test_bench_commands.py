"""What a person sees of `trifleet bench` and `plan` who made a mistake: a sentence, and no traceback."""

import importlib.util
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.http_path import _await_health, flags
from deploy.cli import app
from deploy.fleet import FleetError


def refusal(*arguments: str, code: int) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == code
    return " ".join(result.output.split())


@pytest.mark.parametrize("command", ["http", "start", "soak", "chaos", "fuzz"])
def test_settings_that_are_wrong_are_refused_in_a_sentence(tmp_path: Path, command: str) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("served_model_name: m\nreplicas: none\n")
    said = refusal("bench", command, "-f", str(file), code=1)
    assert "replicas" in said
    assert "fleet.yaml" in said


def test_a_port_that_is_taken_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = tmp_path / "fleet.yaml"
        file.write_text(f"served_model_name: m\nhttp: {{port: {port}}}\n")
        assert f"{port}" in refusal("bench", "start", "-f", str(file), code=1)


@pytest.mark.parametrize("loads", ["32", "32x", "0x300", "32x300,", "ax300", "32x300x2"])
def test_loads_of_another_form_are_refused_by_name(loads: str) -> None:
    assert "write REQUESTSxOUTPUT_TOKENS, separated by commas" in refusal("bench", "sweep", "--loads", loads, code=2)


def test_sizes_of_memory_that_are_no_numbers_are_refused_by_name() -> None:
    assert '--pools has "much": write TOKENS' in refusal("bench", "sweep", "--pools", "8192,much", code=2)


@pytest.mark.parametrize("command", [("bench", "fleet-sim"), ("plan", "qwen3-8b", "--gpu-gib", "40")])
@pytest.mark.parametrize("name", ["plan.foo", "plan"])
def test_a_file_that_is_no_picture_is_refused_before_the_work(
    tmp_path: Path, command: tuple[str, ...], name: str
) -> None:
    said = refusal(*command, "--plot", str(tmp_path / name), code=2)
    assert "name a file in .png, .svg, .pdf" in said


def test_hostile_requests_need_a_package_that_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("benchmarks.cli.find_spec", lambda name: None if name == "schemathesis" else found(name))
    assert "schemathesis, which makes the requests, is not installed" in refusal("bench", "fuzz", code=1)


def test_vllms_own_server_understands_every_kind_of_engine_argument() -> None:
    from vllm import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 4096,
        "cudagraph_capture_sizes": [1, 2],
        "hf_overrides": {"rope_theta": 1.0},
        "kv_cache_dtype": "auto",
    }
    parsed = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags(arguments))
    assert {name: getattr(parsed, name) for name in arguments} == arguments


_LOG = """\
/lib/api_server.py:24: DeprecationWarning: old
  warnings.warn(
(EngineCore pid=17) ERROR 11-28 21:53:40 [core.py:1510] EngineCore failed to start.
(EngineCore pid=17) ERROR 11-28 21:53:40 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=17) ERROR 11-28 21:53:40 [core.py:1510]   File "/lib/core.py", line 157, in __init__
(EngineCore pid=17) ERROR 11-28 21:53:40 [core.py:1510]     raise ValueError(
(EngineCore pid=17) ERROR 11-28 21:53:40 [core.py:1510] ValueError: the pool is too small
Traceback (most recent call last):
  File "/lib/core.py", line 157, in __init__
    raise ValueError(
ValueError: the pool is too small
pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len is too long
    For further information visit a page
"""


@pytest.mark.parametrize(
    ("log", "reasons"),
    [
        (
            _LOG,
            "ValueError: the pool is too small\npydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, max_model_len is too long",
        ),
        ("usage: api_server\napi_server: error: no such argument\n", "api_server: error: no such argument"),
    ],
)
def test_where_vllms_own_server_does_not_start_its_reasons_are_told(log: str, reasons: str) -> None:
    with tempfile.TemporaryFile() as file:
        script = f"import sys; print({log!r}); sys.exit(3)"
        server = subprocess.Popen([sys.executable, "-c", script], stdout=file, stderr=file)
        with pytest.raises(FleetError) as raised:
            _await_health("http://127.0.0.1:9", server, file)
    assert str(raised.value).startswith("vLLM's own server did not start (exit code 3):\n")
    assert str(raised.value).endswith(reasons)
    assert "File" not in str(raised.value)
