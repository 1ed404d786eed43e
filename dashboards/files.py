"""Where the dashboards and the rules lie as files. Imports nothing of Grafana's, which takes a second."""

from pathlib import Path

EXPORTED = Path(__file__).parent / "export"
RULES = Path(__file__).parent / "rules" / "trifleet.rules.yaml"
