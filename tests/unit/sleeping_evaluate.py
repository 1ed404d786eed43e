"""`trifleet evaluate` as a script, with cells that sleep instead of running an engine."""

import time

from benchmarks.quality import engine
from deploy.cli import app


def sleep(*cell: object) -> None:
    time.sleep(600)


if __name__ == "__main__":
    engine.run_cell = sleep  # type: ignore[assignment]
    app()
