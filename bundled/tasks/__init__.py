"""What the bundled model can do: three tasks with long step-by-step replies, and a few chat lines.

Owns their text, the seeds that keep held-out instances apart from training, and the check of an answer; knows no
tokenizer and no model. Every word of a task is one token of the bundled tokenizer, and so is the end of a line.
"""

from bundled.tasks.chat import CAPABILITY, chat_line, system_line
from bundled.tasks.held_out import LONGEST, TASKS, held_out, instance, reply_tokens
from bundled.tasks.instance import Instance
from bundled.tasks.program import (
    LONGEST_PROGRAM,
    MOST_ASKED,
    MOST_HOPS,
    MOST_NAMES,
    SYMBOLS,
    TOKENS_PER_LINE,
    needle,
    registers,
)
from bundled.tasks.search import FAMILIES, LARGEST_GRAPH, search

__all__ = [
    "CAPABILITY",
    "FAMILIES",
    "LARGEST_GRAPH",
    "LONGEST",
    "LONGEST_PROGRAM",
    "MOST_ASKED",
    "MOST_HOPS",
    "MOST_NAMES",
    "SYMBOLS",
    "TASKS",
    "TOKENS_PER_LINE",
    "Instance",
    "chat_line",
    "held_out",
    "instance",
    "needle",
    "registers",
    "reply_tokens",
    "search",
    "system_line",
]
