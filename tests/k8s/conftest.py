"""Rendered overlays, and where `kubectl` is."""

import functools
import subprocess
from pathlib import Path

import pytest

from tests.k8s.tools import tool

ROOT = Path(__file__).parents[2]
# Beside the project: the definitions as their projects publish them.
CRDS = ROOT.parent / "shared" / "crds"
OVERLAYS = ("cpu-demo", "gpu", "gpu-tensor-parallel", "production")


@functools.cache
def rendered(folder: str) -> str:
    """`kubectl kustomize` of a folder below `k8s/`."""
    command = [tool("kubectl"), "kustomize", str(ROOT / "k8s" / folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """The name of each overlay in turn."""
    return str(request.param)
