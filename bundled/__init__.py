"""The bundled model: a small Qwen3 that walks tables step by step. Owns where it lies and what to ask it."""

from pathlib import Path

from bundled import tasks

MODEL = Path(__file__).parent / "model"
STATISTICS = MODEL.parent / "statistics.safetensors"
"""Beside the model's folder, not in it: vLLM loads every safetensors file in there as weights."""


def demo_prompt(seed: int, tokens: int) -> str:
    """A user message whose reply takes about `tokens` output tokens (up to about 2,400)."""
    return tasks.held_out_walk(seed, tokens).prompt


def short_prompt(seed: int) -> str:
    """A user message with a short reply (under 80 output tokens): small talk or a walk of a few steps."""
    talk = ("Hello", "What can you do?", "Tell me about the sea.", "Thank you!")
    return talk[seed // 2 % len(talk)] if seed % 2 else tasks.held_out_walk(seed, 60).prompt
