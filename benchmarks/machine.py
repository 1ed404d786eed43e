"""What a figure was measured on: versions and cores, so that a result file says how far it carries."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """The processor's kind, the vector instructions that PyTorch uses on it, cores, load average over the last minute,
    Python and the versions of `packages`."""
    import torch  # here, because not all that is measured has it in its process

    return {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return version(f"{package}-cpu")  # vLLM's and its CPU build's distributions differ in name
