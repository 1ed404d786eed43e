"""What a model of the three tasks is trained on: batch number i of the curriculum, from i and the level alone.

A batch has rows of one length, each with one conversation that nearly fills it, so that little is padding. The level
is the longest length so far; it rises when the model makes hardly a mistake any more at its present one, for lookups
form among few candidates and then extend to many, and do not form among many. Rows get jumps in their positions between
two lines of the reply: so a short row shows keys at the distances of a long one. The line after a jump is not trained
on, for it copies from the line before.
"""

from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from bundled import tasks, tokenizer

IGNORED = -100
BATCH_TOKENS = 3_072
LENGTHS = (96, 192, 384, 768, 1_536, 2_304)
FEW_SYMBOLS = (6, 12)
"""Symbols in use at the first levels; all of them later."""
LONGEST_JUMP = 3_000
TRAINED_FAMILIES = (2, 1, 1)
"""How often each of the tasks' FAMILIES is trained on."""


@dataclass(frozen=True)
class Batch:
    """int64 [rows, tokens] each; labels are IGNORED outside replies."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


class Curriculum:
    def __init__(self, tokens: PreTrainedTokenizerFast) -> None:
        self._tokens = tokens
        self._end = tokens.convert_tokens_to_ids(tokenizer.END)
        self._user = tokens.convert_tokens_to_ids(tokenizer.USER)
        self._system = tokens.convert_tokens_to_ids(tokenizer.SYSTEM)
        self._assistant = tokens.convert_tokens_to_ids(tokenizer.ASSISTANT)
        self._newline = tokens.encode("\n", add_special_tokens=False)[0]

    def batch(self, number: int, level: int) -> Batch:
        """Most batches have rows of the level's length or of the one before, the others of shorter ones."""
        random = Random(f"training batch {number}")
        share = random.random()
        if share < 0.3 or level == 0:
            length = LENGTHS[level]
        elif share < 0.75:
            length = LENGTHS[level - 1]
        else:
            length = random.choice(LENGTHS[:level])
        rows = [self._row(random, length, level) for _ in range(BATCH_TOKENS // length)]
        ids, positions, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
        return Batch(ids, positions, labels)

    def _row(self, random: Random, length: int, level: int) -> tuple[list[int], list[int], list[int]]:
        while True:
            ids, labels = self._conversation(random, length, level)
            if length // 2 < len(ids) <= length:
                break
        positions = self._positions(random, ids, labels)
        padding = length - len(ids)
        return (
            ids + [0] * padding,
            positions + [positions[-1]] * padding,
            labels + [IGNORED] * padding,
        )

    def _conversation(self, random: Random, length: int, level: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        if random.random() < 0.1:
            ids += [self._system, *self._encode(tasks.system_line(random)), self._end]
            labels += [IGNORED] * len(ids)
        chats = random.random() < 0.05 and length <= LENGTHS[2]
        while True:
            turn = tasks.chat_line(random) if chats else training_instance(random, length, level)
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


def training_instance(random: Random, length: int, level: int) -> tasks.Instance:
    """A task whose conversation has up to about `length` tokens; it may turn out too long."""
    kind = random.random()
    if kind < 0.6:
        # Most of what can be an edge is one in a large tree alone, and a word that is never trained on is never said.
        most = min(tasks.LARGEST_GRAPH, max(4, length // 16))
        nodes = max(random.randint(3, most), random.randint(3, most))
        (family,) = random.choices(tasks.FAMILIES, TRAINED_FAMILIES)
        return tasks.search(random, family, nodes, random.uniform(0.3, 1.0))
    symbols = tasks.SYMBOLS[: FEW_SYMBOLS[level]] if level < len(FEW_SYMBOLS) else tasks.SYMBOLS
    if random.random() < 0.5:  # many marks
        program = random.randint(1, 2)
    else:
        program = random.randint(1, min(tasks.LONGEST_PROGRAM, max(1, length // 40)))
    if kind < 0.8:
        per_name = tasks.TOKENS_PER_LINE * program + 13
        room = length - program - 30
        names = max(1, min(len(symbols), int(room / per_name * random.uniform(0.7, 1.0))))
        return tasks.registers(random, names, program, random.randint(1, tasks.MOST_ASKED), symbols)
    others = random.randint(0, 1)
    hops = random.randint(1, min(tasks.MOST_HOPS, len(symbols) // (1 + others) - 1))
    room = length - program - 30 - (2 + others) * (hops + 1)
    per_name = tasks.TOKENS_PER_LINE * program + 13
    names = max(1, min(len(symbols), int(room / per_name * random.uniform(0.5, 1.0))))
    return tasks.needle(random, names, program, hops, others, symbols)
