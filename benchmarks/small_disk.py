"""The fault `disk_full` of `trifleet bench chaos`: the file system of Ray's session, with every log, fills up.

It must be a file system of its own, so this runs as a script in a mount namespace of its own, where it mounts one: what
is mounted there nobody else sees, and it is gone with the process. Linux lets every user do that (`unshare`).
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos import strike_here
from deploy.fleet import running_fleet
from deploy.settings import load_settings

SIZE = "96m"
FULL_SECONDS = 20.0


def strike_on_a_small_disk(settings_file: Path) -> dict[str, Any]:
    """The figures of the fault. Raises CalledProcessError where nothing may be mounted."""
    # A short path, because Ray's sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="disk-", dir="/tmp") as folder, tempfile.NamedTemporaryFile() as figures:
        command = ("unshare", "--map-root-user", "--mount", sys.executable, "-m", "benchmarks.small_disk")
        subprocess.run([*command, settings_file, folder, figures.name], check=True)
        found: dict[str, Any] = json.loads(Path(figures.name).read_text())
    return found


def main(settings_file: Path, folder: Path, figures: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", folder], check=True)
    os.environ["RAY_TMPDIR"] = str(folder)

    async def fill(family: list[psutil.Process]) -> str:
        """It stays full to the end of the fleet."""
        written = _fill(folder / "filler")
        await asyncio.sleep(FULL_SECONDS)
        return f"{written:,} bytes written until the disk was full, {_free(folder)} free after {FULL_SECONDS:g} s"

    settings = load_settings(settings_file)
    with running_fleet(settings) as url:
        row = strike_here(url, settings, fill)
        figures.write_text(json.dumps(row | {"bytes_free_at_the_end": _free(folder)}))


def _fill(path: Path) -> int:
    """Write until there is no room for a byte; how many went in."""
    written = 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                written += os.write(file, bytes(size))
        except OSError:
            continue
    os.close(file)
    return written


def _free(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
