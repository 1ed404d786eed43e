"""What NVML says of a replica's GPUs: memory, power, energy. Where there is no NVML there is no meter."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pynvml

from replicas.messages import GpuReading

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class GpuMeter:
    """Reads the GPUs with these NVML handles, all together. Energy counts from here on."""

    def __init__(self, handles: list[Any], nvml: ModuleType = pynvml) -> None:
        self._nvml = nvml
        self._handles = handles
        self._energy_before = self._sum("nvmlDeviceGetTotalEnergyConsumption") or 0

    @classmethod
    def open(cls, environment: Mapping[str, str], nvml: ModuleType = pynvml) -> "GpuMeter | None":
        """A meter of the GPUs that CUDA shows this process (Ray sets that); None without GPUs, driver or NVML."""
        devices = [name for name in environment.get(VISIBLE_DEVICES, "").split(",") if name.strip()]
        if not devices:
            return None
        try:
            nvml.nvmlInit()
            return cls([_handle(device.strip(), nvml) for device in devices], nvml)
        except nvml.NVMLError:
            return None

    def read(self) -> GpuReading | None:
        """Takes milliseconds: not for an event loop. What a GPU does not tell (a MIG slice has no power) is None; all
        of it, when it is lost."""
        energy = self._sum("nvmlDeviceGetTotalEnergyConsumption")
        power = self._sum("nvmlDeviceGetPowerUsage")
        try:
            memory = [self._nvml.nvmlDeviceGetMemoryInfo(handle) for handle in self._handles]
        except self._nvml.NVMLError:
            return None
        return GpuReading(
            gpus=len(self._handles),
            memory_bytes=sum(one.total for one in memory),
            memory_used_bytes=sum(one.used for one in memory),
            power_watts=None if power is None else power / 1000,
            energy_joules=None if energy is None else (energy - self._energy_before) / 1000,
        )

    def _sum(self, function: str) -> int | None:
        """Over all GPUs, in NVML's milliwatts and millijoules."""
        try:
            return sum(getattr(self._nvml, function)(handle) for handle in self._handles)
        except self._nvml.NVMLError:
            return None


def _handle(device: str, nvml: ModuleType) -> Any:
    """CUDA names GPUs by number, or by UUID when the node's own list does."""
    return nvml.nvmlDeviceGetHandleByIndex(int(device)) if device.isdigit() else nvml.nvmlDeviceGetHandleByUUID(device)
