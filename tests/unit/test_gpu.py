"""The GPU meter: against a fake NVML, and against this machine as it is."""

import os

import pynvml
import pytest

from replicas.gpu import GpuMeter
from replicas.messages import GpuReading
from tests.unit.fake_nvml import FakeNvml


def test_the_gpus_of_a_replica_are_read_together_and_energy_counts_from_the_start():
    nvml = FakeNvml()
    meter = GpuMeter.open({"CUDA_VISIBLE_DEVICES": "0, 1"}, nvml)
    assert meter.read() == GpuReading(2, 160 << 30, 20 << 30, power_watts=600, energy_joules=0)
    nvml.gpus["GPU-b"].millijoules += 1_500
    nvml.gpus["GPU-a"].milliwatts = 700_000
    assert (meter.read().energy_joules, meter.read().power_watts) == (1.5, 1000)


def test_only_the_gpus_that_the_process_may_use_are_read():
    nvml = FakeNvml()
    nvml.gpus["GPU-b"].used = 3 << 30
    for devices in ("1", "GPU-b"):
        reading = GpuMeter.open({"CUDA_VISIBLE_DEVICES": devices}, nvml).read()
        assert (reading.gpus, reading.memory_used_bytes) == (1, 3 << 30)


def test_a_slice_that_tells_no_power_is_read_without():
    reading = GpuMeter.open({"CUDA_VISIBLE_DEVICES": "0"}, FakeNvml(has_power=False)).read()
    assert (reading.power_watts, reading.energy_joules, reading.memory_bytes) == (None, None, 80 << 30)


def test_of_a_gpu_that_is_lost_nothing_is_told_rather_than_what_was():
    nvml = FakeNvml()
    meter = GpuMeter.open({"CUDA_VISIBLE_DEVICES": "0"}, nvml)
    nvml.is_lost = True
    assert meter.read() is None
    nvml.is_lost = False
    assert meter.read() is not None


@pytest.mark.parametrize(("devices", "nvml"), [("0", FakeNvml(driver=False)), ("7", FakeNvml()), ("", FakeNvml())])
def test_without_driver_or_gpu_there_is_no_meter(devices, nvml):
    assert GpuMeter.open({"CUDA_VISIBLE_DEVICES": devices}, nvml) is None


def test_the_real_nvml_of_this_machine_is_read_or_found_absent():
    try:
        pynvml.nvmlInit()
        there = pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        there = False
    meter = GpuMeter.open({**os.environ, "CUDA_VISIBLE_DEVICES": "0"})
    assert (meter is not None) == there
    if meter is not None:
        assert 0 < meter.read().memory_used_bytes <= meter.read().memory_bytes
