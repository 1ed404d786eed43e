"""What a model of the three tasks is trained on: batch number i of the curriculum, from nothing but i.

A batch has rows of one length, each with one conversation that nearly fills it, so that little is padding. Lengths
grow as training goes on. Rows get jumps in their positions between two lines of the reply: so a short row shows keys
at the distances of a long one. The line after a jump is not trained on, for it copies from the line before.
"""

from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from bundled.reasoner import tasks, tokenizer

IGNORED = -100
BATCH_TOKENS = 3_072
DRILL = 96
LENGTHS = (192, 384, 768, 1_536, 3_072)
_SHARES = ((1, 0, 0, 0, 0), (3, 2, 1, 0, 0), (3, 2, 2, 2, 1))
"""How often each length comes, in the three stages of training."""
STAGES = (0.45, 0.7)
"""Shares of the run at which the second and the third stage start."""
DENSE_FROM = 500
"""Step from which on rare lookups come more often: by then all that is frequent has been learned."""
DRILLS = (860, 0.6, 0.15)
"""Step from which on there are drills, their share of the first stage's batches, and of the later ones'. A drill is a
batch of DRILL tokens a row with lookups among few candidates; among many, they do not form by themselves."""
LONGEST_JUMP = 3_000
POOLED_FROM = 1_200
"""Step from which on rows with few symbols draw them from the first ones, as graphs do: a lookup of a few symbols forms
soon and then extends to the others; of all at once it does not form."""


@dataclass(frozen=True)
class Batch:
    """int64 [rows, tokens] each; labels are IGNORED outside replies."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


class Curriculum:
    def __init__(self, tokens: PreTrainedTokenizerFast, steps: int) -> None:
        self._tokens = tokens
        self._steps = steps
        self._end = tokens.convert_tokens_to_ids(tokenizer.END)
        self._user = tokens.convert_tokens_to_ids(tokenizer.USER)
        self._system = tokens.convert_tokens_to_ids(tokenizer.SYSTEM)
        self._assistant = tokens.convert_tokens_to_ids(tokenizer.ASSISTANT)
        self._newline = tokens.encode("\n", add_special_tokens=False)[0]

    def batch(self, number: int) -> Batch:
        random = Random(f"training batch {number}")
        stage = sum(number >= share * self._steps for share in STAGES)
        length = random.choices(LENGTHS, _SHARES[stage])[0]
        first, *shares = DRILLS
        if number >= first and random.random() < shares[min(stage, 1)]:
            length = DRILL
        rows = [self._row(random, length, number) for _ in range(BATCH_TOKENS // length)]
        ids, positions, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
        return Batch(ids, positions, labels)

    def _row(self, random: Random, length: int, number: int) -> tuple[list[int], list[int], list[int]]:
        while True:
            ids, labels = self._conversation(random, length, number)
            if length // 2 < len(ids) <= length:
                break
        positions = self._positions(random, ids, labels)
        padding = length - len(ids)
        return (
            ids + [0] * padding,
            positions + [positions[-1]] * padding,
            labels + [IGNORED] * padding,
        )

    def _conversation(self, random: Random, length: int, number: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        if random.random() < 0.1:
            ids += [self._system, *self._encode(tasks.system_line(random)), self._end]
            labels += [IGNORED] * len(ids)
        chats = random.random() < 0.08 and length <= LENGTHS[1]
        while True:
            turn = tasks.chat_line(random) if chats else training_instance(random, length, number)
            prompt = [self._user, *self._encode(turn.prompt), self._end, self._assistant]
            reply = [*self._encode(turn.reply), self._end]
            ids += prompt + reply
            labels += [IGNORED] * len(prompt) + reply
            if not chats or len(ids) > length * 2 // 3:
                return ids, labels

    def _positions(self, random: Random, ids: list[int], labels: list[int]) -> list[int]:
        """Positions with up to two jumps after ends of lines of the reply; takes their next lines out of `labels`."""
        ends = [place for place, token in enumerate(ids) if token == self._newline and labels[place] != IGNORED]
        jumps = {}
        if ends and random.random() < 0.6:
            for place in random.sample(ends, min(random.randint(1, 2), len(ends))):
                jumps[place] = int(LONGEST_JUMP ** random.random())
        positions, offset = [], 0
        place = 0
        for place in range(len(ids)):
            positions.append(place + offset)
            offset += jumps.get(place, 0)
        for place in jumps:
            for after in range(place + 1, len(ids)):
                labels[after] = IGNORED
                if ids[after] == self._newline:
                    break
        return positions

    def _encode(self, text: str) -> list[int]:
        return self._tokens.encode(text, add_special_tokens=False)


def training_instance(random: Random, length: int, number: int) -> tasks.Instance:
    """A task for batch `number` whose conversation has up to about `length` tokens; it may turn out too long."""
    pooled = number >= POOLED_FROM
    if length == DRILL:
        return _drill(random, pooled)
    dense = number >= DENSE_FROM
    kind = random.random()
    if kind < (0.35 if dense else 0.45):
        nodes = random.randint(3, min(tasks.LARGEST_GRAPH, max(5, length // 14)))
        return tasks.search(random, random.choice(tasks.FAMILIES), nodes, random.uniform(0.3, 1.0))
    program = random.randint(1, min(tasks.LONGEST_PROGRAM, max(1, length // 40)))
    if dense and random.random() < 0.4:
        program = random.randint(1, 2)
    run = tasks.TOKENS_PER_LINE * (program + 1) + 3
    if kind < (0.7 if dense else 0.8):
        room = length - program - 25
        names = max(1, min(tasks.MOST_NAMES, int(room / (run + 4) * random.uniform(0.7, 1.0))))
        return tasks.registers(random, names, program, random.randint(1, names), _pool(names, pooled))
    hops = random.randint(2, 7) if dense else random.randint(1, 5)
    room = length - program - 60 - 8 * hops
    names = max(1, min(tasks.MOST_NAMES, int(room / run * random.uniform(0.5, 1.0))))
    if not pooled:
        return tasks.needle(random, names, program, hops)
    hops = random.randint(1, 4)
    others = random.randint(1, 2)
    return tasks.needle(random, names, program, hops, others, _pool((1 + others) * (hops + 1), pooled))


def _drill(random: Random, pooled: bool) -> tasks.Instance:
    """Arrows, marks or edges, few of them."""
    kind = random.random()
    if kind < 0.1:
        return tasks.search(random, random.choice(tasks.FAMILIES), random.randint(3, 6), random.uniform(0.3, 1.0))
    if kind < 0.5:
        names = random.randint(2, 4)
        return tasks.registers(random, names, 1, names, _pool(names, pooled))
    if not pooled:
        return tasks.needle(random, 1, 1, random.randint(2, 7), random.choice((0, 1, 1, 1, 2)))
    hops = random.randint(1, 5)
    return tasks.needle(random, 1, 1, hops, 1, _pool(2 * (hops + 1), pooled))


def _pool(needed: int, pooled: bool) -> int:
    return needed + needed // 2 if pooled else tasks.MOST_NAMES
