"""A small model that reasons step by step: three tasks whose answers need old lines of the reply itself.

Owns where the model lies. `trifleet evaluate` poses the tasks, to it or to any other model.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
STATISTICS = MODEL.parent / "statistics.safetensors"
"""Beside the model's folder, not in it: vLLM loads every safetensors file in there as weights."""
