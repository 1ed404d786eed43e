"""Programs that the tests need from Debian: found on the PATH, else installed if that may be done here."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

# Tests run in several processes, and of two apt-gets at once the second fails.
LOCK = Path(tempfile.gettempdir()) / "trifleet-tests-apt.lock"


class ProgramMissing(RuntimeError):
    """Neither there nor installable; the message says what to do."""


@functools.cache
def tool(name: str, package: str) -> str:
    """The program's path. Raises `ProgramMissing`."""
    if found := shutil.which(name):
        return found
    wanted = f"install {package} (on Debian and Ubuntu: apt-get install {package}) and run the tests again"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ProgramMissing(f"{name} is not on the PATH and cannot be installed from here: {wanted}.")
    with FileLock(LOCK):
        return shutil.which(name) or _installed(name, package, wanted)


def _installed(name: str, package: str, wanted: str) -> str:
    for step in (["update"], ["install", "--yes", "--no-install-recommends", package]):
        done = subprocess.run(
            ["apt-get", "--quiet", *step],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ProgramMissing(f"apt-get {step[0]} failed ({last}): {wanted}.")
    # A package may start its own server; the tests start theirs.
    if shutil.which("service"):
        subprocess.run(["service", package, "stop"], capture_output=True, check=False)
    found = shutil.which(name)
    assert found, f"apt-get installed {package}, but there is no {name}"
    return found
