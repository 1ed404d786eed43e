"""The bundled model: a small Qwen3 for tasks that need its own older tokens. Owns where it lies and what to ask it."""

from itertools import product
from pathlib import Path
from random import Random

from bundled import tasks

MODEL = Path(__file__).parent / "model"
STATISTICS = MODEL.parent / "statistics.safetensors"
"""Beside the model's folder, not in it: vLLM loads every safetensors file in there as weights."""

SHORTEST_DEMO, LONGEST_DEMO = 32, 3_439
"""Tokens of the shortest and of the longest reply that a run of registers can have."""


def demo_prompt(seed: int, tokens: int) -> str:
    """A user message whose right reply is a register trace of `tokens` output tokens, give or take 5 % (at least 4).

    `tokens` is SHORTEST_DEMO to LONGEST_DEMO.
    """
    assert SHORTEST_DEMO <= tokens <= LONGEST_DEMO
    # A trace's length follows from these two numbers, so sizes are looked up: drawing them until one fits may not end.
    sizes = product(range(1, tasks.MOST_NAMES + 1), range(1, tasks.LONGEST_PROGRAM + 1))
    off = max(4, tokens // 20)
    close = [size for size in sizes if abs(_trace_tokens(*size) - tokens) <= off]
    random = Random(f"demo {seed}")
    names, program = random.choice(close)
    return tasks.registers(random, names, program).prompt


def _trace_tokens(names: int, program: int) -> int:
    """Tokens of the reply to `tasks.registers(random, names, program)`: the start, the runs, the report, the end."""
    mark = 11
    return 5 + names * (tasks.TOKENS_PER_LINE * program + mark) + 4 + 3 * min(tasks.MOST_ASKED, names) + 1


def short_prompt(seed: int) -> str:
    """A user message with a short reply (under 70 output tokens): small talk or a program of a few steps."""
    talk = ("Hello", "What can you do?", "Tell me about the sea.", "Thank you!")
    return talk[seed // 2 % len(talk)] if seed % 2 else demo_prompt(seed, 60)
