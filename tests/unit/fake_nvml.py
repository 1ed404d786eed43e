"""A fake of pynvml for machines without a GPU: two H100s, numbered and named, that draw what a test says."""

from types import SimpleNamespace


class NVMLError(Exception):
    pass


class FakeNvml:
    """Stands in for the module: the few functions that the meter calls, in NVML's own units (bytes, mW, mJ)."""

    NVMLError = NVMLError

    def __init__(self, *, driver: bool = True, has_power: bool = True) -> None:
        self.driver = driver
        self.has_power = has_power
        self.is_lost = False
        self.gpus = {
            name: SimpleNamespace(used=10 << 30, milliwatts=300_000, millijoules=5_000_000)
            for name in ("GPU-a", "GPU-b")
        }

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index >= len(self.gpus):
            raise NVMLError("Invalid Argument")
        return list(self.gpus)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        if self.is_lost:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(total=80 << 30, used=self.gpus[handle].used)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if not self.has_power:
            raise NVMLError("Not Supported")
        return self.gpus[handle].milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.has_power:
            raise NVMLError("Not Supported")
        return self.gpus[handle].millijoules
