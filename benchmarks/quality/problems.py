"""What is asked of a model, and whether a reply is right: held-out tasks, or a user's file of prompts and answers."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bundled import tasks

TOKENS_BEYOND_REPLY = 64
"""What a reply may take beyond the right one before it is cut off."""


class ProblemError(ValueError):
    """The problems cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class Problem:
    """One request of a task. Its prompt is a user's message."""

    task: str
    prompt: str
    max_tokens: int | None
    """None: as many as the right reply has in the model's own tokens, and TOKENS_BEYOND_REPLY more."""
    is_correct: Callable[[str], bool]
    reply: str = ""
    """The right reply, where it is known."""


def held_out(task: str, count: int, low: int, high: int) -> list[Problem]:
    """The first `count` held-out instances of a task with replies of `low` to `high` tokens."""
    instances = (tasks.held_out(task, seed, low, high) for seed in range(count))
    return [Problem(task, made.prompt, None, made.is_correct, made.reply) for made in instances]


def from_file(path: Path, max_tokens: int) -> list[Problem]:
    """A JSONL file, one `{"prompt": ..., "answer": ...}` a line, as a task of the file's name.

    Raises ProblemError, with the line's number, for a line that is something else, and for an empty file.
    """
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            prompt, answer = values["prompt"], values["answer"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = answer = None
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
            raise ProblemError(
                f'{path} line {number} is no problem: write {{"prompt": "...", "answer": "..."}} with text in both'
            )
        problems.append(Problem(path.stem, prompt, max_tokens, _States(answer)))
    if not problems:
        raise ProblemError(f'{path} has no problems: write one {{"prompt": "...", "answer": "..."}} a line')
    return problems


@dataclass(frozen=True)
class _States:
    """Whether the last line of a reply that holds anything has the answer in it as words of their own.

    Where the answer begins or ends with a number, it is the whole number: 5 is in "x = 5." but not in -5, 1/5, 5,000.
    A class and no closure, because problems go to other processes.
    """

    answer: str

    def __call__(self, reply: str) -> bool:
        lines = reply.strip().splitlines()
        return bool(lines) and self._pattern.search(lines[-1]) is not None

    @property
    def _pattern(self) -> re.Pattern[str]:
        words = self.answer.split()
        before = r"(?<![\w.,/+\-−])" if re.match(r"[+\-−]?\d", words[0]) else r"(?<![\w.])"
        after = r"(?!\w|[.,/]\d)" if words[-1][-1].isdigit() else r"(?!\w|\.\d)"
        return re.compile(before + r"\s+".join(map(re.escape, words)) + after)
