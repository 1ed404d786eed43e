"""All dashboards as JSON that Grafana imports, and the rules that Prometheus loads."""

import json
import shutil
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards import capacity, compaction, requests, routing
from dashboards.files import RULES


def dashboards() -> list[Dashboard]:
    return [made.dashboard() for made in (capacity, compaction, requests, routing)]


def to_json(dashboard: Dashboard) -> str:
    return json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def export(folder: Path) -> list[Path]:
    """Write every dashboard as `<uid>.json` into the folder; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{made.uid}.json": to_json(made) for made in dashboards()}
    for file, text in files.items():
        file.write_text(text)
    return list(files)


def export_rules(folder: Path) -> Path:
    """Copy the recording rules and alerts into the folder; the file written."""
    return Path(shutil.copy(RULES, folder))
