"""Instances by number and length: task names, and what a seed gives. Training makes its own, elsewhere."""

from random import Random

from bundled.tasks.instance import Instance
from bundled.tasks.program import LONGEST_PROGRAM, MOST_HOPS, MOST_NAMES, TOKENS_PER_LINE, needle, registers
from bundled.tasks.search import FAMILIES, LARGEST_GRAPH, search

TASKS = ("search", "registers", "needle")
LONGEST = 4_000
"""Tokens of the longest reply that `held_out` makes."""
_TRIES = 2_000


def reply_tokens(instance: Instance) -> int:
    """Tokens of a task's reply, the end of turn included."""
    return len(instance.reply.split()) + instance.reply.count("\n") + 1


def held_out(task: str, seed: int, low: int, high: int) -> Instance:
    """Instance number `seed` of a task that was never trained on, with a reply of `low` to `high` tokens."""
    return instance("held-out", task, seed, low, high)


def instance(series: str, task: str, seed: int, low: int, high: int) -> Instance:
    """Instance number `seed` of a task in a series of its own, with a reply of `low` to `high` tokens.

    A search of the largest trees takes up to 940 tokens, of the largest small-world graphs 1,400 and of random ones
    2,400: the family is one that can come that far, and by turns where several can. Raises ValueError where no reply of
    such a length is found.
    """
    assert low <= high <= LONGEST
    random = Random(f"{series} {task} {seed}")
    if task == "search":
        return _search(random, seed, low, high)
    assert task in TASKS, f"task is {task!r}, not one of {', '.join(TASKS)}"
    for _ in range(_TRIES):
        target = random.randint(low, high)
        least = max(min(8, target // 60), -(-target // (TOKENS_PER_LINE * MOST_NAMES)), 1)
        program = random.randint(least, max(least, min(LONGEST_PROGRAM, target // 40)))
        names = max(1, round(target / (TOKENS_PER_LINE * (program + 1))))
        if task == "registers":
            made = registers(random, names, program)
        else:
            made = needle(random, names, program, hops=random.randint(MOST_HOPS - 1, MOST_HOPS))
        if low <= reply_tokens(made) <= high:
            return made
    raise _none_found(task, low, high)


def _search(random: Random, seed: int, low: int, high: int) -> Instance:
    longest = {"tree": 750, "small_world": 1_200, "random": 1_900}
    families = [family for family in FAMILIES if low <= longest[family]] or [FAMILIES[-1]]
    family = families[seed % len(families)]
    for _ in range(_TRIES):
        nodes = random.randint(3 if high < 500 else 10, LARGEST_GRAPH)
        made = search(random, family, nodes, random.uniform(0.8, 0.95))
        if low <= reply_tokens(made) <= high:
            return made
    raise _none_found("search", low, high)


def _none_found(task: str, low: int, high: int) -> ValueError:
    return ValueError(f"no {task} with a reply of {low} to {high} tokens was found: widen the range")
