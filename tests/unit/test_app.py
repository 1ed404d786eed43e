"""What the application gives its replicas, without starting any."""

import pytest

from deploy.app import engine_environment
from deploy.settings import parse_settings

SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
GPU = parse_settings({"served_model_name": "m", "gpus_per_replica": 1})


def test_a_gpu_replica_needs_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SAMPLER, raising=False)
    assert engine_environment(GPU)[SAMPLER] == "0"


def test_whoever_has_nvcc_may_choose_flashinfers_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SAMPLER, "1")
    assert engine_environment(GPU)[SAMPLER] == "1"


def test_the_sampler_is_chosen_by_a_variable_that_vllm_reads() -> None:
    from vllm import envs

    assert SAMPLER in envs.environment_variables
