"""The settings file: what the fleet reads from it, and the sentences for what is wrong with it."""

import ast
import importlib.util
from pathlib import Path

import pytest
import yaml

import bundled
import deploy
from deploy.settings import MANAGED_ARGUMENTS, FleetSettings, SettingsError, load_settings, parse_settings

LOCAL = Path(deploy.__file__).parent / "configs" / "local.yaml"
MINIMAL = {"model": "some/model", "served_model_name": "m"}


def complaint(**values):
    with pytest.raises(SettingsError) as caught:
        parse_settings({**MINIMAL, **values}, "fleet.yaml")
    return str(caught.value)


def test_the_local_configuration_is_two_replicas_of_the_bundled_model_with_its_statistics():
    settings = load_settings(LOCAL)
    assert settings.replicas == 2
    assert settings.model_path == str(bundled.MODEL)
    assert settings.compression is not None
    assert settings.compression.statistics == bundled.STATISTICS


def test_statistics_self_reaches_the_engine_as_the_word():
    compression = {"budget": 512, "window": 64, "statistics": "self"}
    settings = parse_settings({"model": "bundled", "served_model_name": "m", "compression": compression})
    assert settings.compression is not None
    assert settings.compression.statistics == "self"
    assert settings.compression.model_dump(mode="json")["statistics"] == "self"


def test_without_compression_everything_else_stays():
    settings = load_settings(LOCAL)
    plain = settings.without_compression()
    assert plain.compression is None
    assert plain.engine == settings.engine


def test_every_engine_argument_exists_in_vllm():
    # Read from the source: importing vLLM takes longer than all other unit tests together.
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text())
    (engine_args,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "EngineArgs"]
    known = {n.target.id for n in engine_args.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}

    engine = {"block_size": 32, "num_gpu_blocks": 64, "max_num_batched_tokens": 512}
    arguments = parse_settings({**MINIMAL, "engine": engine}).engine_arguments()
    assert len(arguments) == 8
    assert set(arguments) <= known
    assert known >= MANAGED_ARGUMENTS


def test_unset_engine_settings_are_left_to_vllm():
    arguments = FleetSettings(**MINIMAL).engine_arguments()
    assert "block_size" not in arguments
    assert "num_gpu_blocks_override" not in arguments


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"replicas": 0}, "fleet.yaml: replicas is 0: it should be greater than or equal to 1"),
        ({"replcas": 2}, "fleet.yaml: replcas is not a setting: did you mean replicas?"),
        ({"engine": {"max_model_lenn": 1}}, "engine.max_model_lenn is not a setting: did you mean max_model_len?"),
        ({"engine": {"dtype": "int4"}}, "engine.dtype is 'int4': it should be 'auto', 'float32'"),
        ({"engine": {"extra": {"scheduler_cls": "x"}}}, "scheduler_cls is set by the fleet itself"),
        ({"engine": {"extra": {"ssl_keyfile": "x"}}}, "ssl_keyfile has no effect in a fleet: use a proxy with TLS"),
        ({"engine": {"extra": {"api_key": "x"}}}, "api_key has no effect in a fleet: use access and the keys of"),
        (
            {"engine": {"extra": {"data_parallel_size": 2}}},
            "data_parallel_size is 2, but a replica is one engine to the coordinator: leave it out of engine.extra and "
            "raise replicas",
        ),
        (
            {"engine": {"extra": {"kv_offloading_size": 4}}},
            "kv_offloading_size is 4, but the engine's reports travel where a KV connector's statistics would: "
            "leave it out of engine.extra",
        ),
        (
            {"engine": {"num_gpu_blocks": 9, "kv_cache_memory_bytes": 99}},
            "num_gpu_blocks is 9 and kv_cache_memory_bytes is 99: both set the size of the KV pool",
        ),
        ({"coordinator": {"long_placement": "best"}}, 'there is no placement policy "best": choose one of'),
        ({"coordinator": {"stale_report_seconds": 0.1}}, "every replica would look stale"),
        ({"compression": {"budget": 64, "window": 128}}, "window is 128 but budget is 64"),
        ({"compression": {"budget": 512, "window": 64}}, "statistics is not set"),
        (
            {"compression": {"budget": 512, "policy": "random", "max_offset": 1000}},
            "max_offset is 1000: offsets are powers of two, so set it to one, such as 512",
        ),
        ({"compression": {"budget": 512, "policy": "random", "segments": 0}}, "segments is 0"),
        ({"http": {"port": "web"}}, "http.port is 'web': it should be a valid integer"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence_that_names_it(values, sentence):
    assert sentence in complaint(**values)


def test_every_mistake_has_its_own_line():
    assert len(complaint(replicas=0, http={"port": 0}).splitlines()) == 2


def test_a_missing_setting_is_named():
    with pytest.raises(SettingsError, match="served_model_name is missing"):
        parse_settings({"model": "x"})


def test_files_that_hold_no_settings_are_named(tmp_path):
    with pytest.raises(SettingsError, match="there is no settings file"):
        load_settings(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(SettingsError, match="is not valid YAML"):
        load_settings(broken)
    broken.write_text("just words")
    with pytest.raises(SettingsError, match="holds no settings"):
        load_settings(broken)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(SettingsError, match=r"cannot be read .Is a directory.: name a YAML file with --file"):
        load_settings(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"latin.yaml cannot be read .*can't decode byte.*: name a YAML file"):
        load_settings(tmp_path / "latin.yaml")


def test_settings_survive_a_round_trip_through_yaml():
    settings = load_settings(LOCAL)
    assert parse_settings(yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))) == settings
