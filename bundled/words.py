"""Embeddings of words that are made of parts: ` 3>7` is a form ` N>N`, a first 3, a last 7 and a little of its own.

Of a thousand pairs of nodes most are rarely trained on. What all words of a form, of a first and of a last part have in
common is learned from all of them, so it holds for a pair that was never seen.
"""

import re
from collections import defaultdict

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from transformers import PreTrainedTokenizerFast

from bundled import tokenizer

SPREAD = 0.05
"""Standard deviation of first embeddings."""
_NAME = r"(?<![a-z])[kmprz][aiou](?![a-z])"
_NOTHING = 0


def form(word: str) -> str:
    """The word with N for numbers and S for names."""
    return re.sub(_NAME, "S", re.sub(r"\d+", "N", word)).strip(" ")


class Words(nn.Module):
    """Makes the embeddings [vocabulary, size] of learned vectors [parts, size]: the sum of each word's.

    A parametrization (torch.nn.utils.parametrize) of the embedding's weight.
    """

    rows: torch.Tensor

    def __init__(self, tokens: PreTrainedTokenizerFast) -> None:
        super().__init__()
        numbers: defaultdict[tuple[str, str], int] = defaultdict(lambda: len(numbers) + 1 + len(tokens))
        # A word's own vector comes first, then its form's, its first part's and its last part's.
        rows = [[1 + number, _NOTHING, _NOTHING, _NOTHING] for number in range(len(tokens))]
        for word in tokenizer.words():
            parts = re.findall(rf"\d+|{_NAME}", word)
            if parts:
                (number,) = tokens.encode(word, add_special_tokens=False)
                first = numbers["first", parts[0]] if len(parts) == 2 else _NOTHING
                rows[number][1:] = [numbers["form", form(word)], first, numbers["last", parts[-1]]]
        self.parts = len(numbers) + 1 + len(tokens)
        self.register_buffer("rows", torch.tensor(rows), persistent=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return embedding_bag(self.rows, vectors, mode="sum", padding_idx=_NOTHING)

    def right_inverse(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Vectors of these embeddings: shared parts hold what they can (least squares), the rest is the words' own."""
        own = slice(1, 1 + len(self.rows))
        made_of_parts = self.rows[:, 3] != _NOTHING
        holds = torch.zeros(len(self.rows), self.parts).scatter_(1, self.rows[:, 1:], 1.0)
        holds[:, _NOTHING] = 0
        vectors = torch.zeros(self.parts, embeddings.shape[1])
        vectors[own.stop :] = torch.linalg.lstsq(
            holds[made_of_parts, own.stop :], embeddings[made_of_parts], driver="gelsd"
        ).solution
        vectors[own] = embeddings - holds @ vectors
        return vectors

    def forget_pairs(self, vectors: torch.Tensor) -> None:
        """Takes away, in place, what words of two parts have of their own: of a rare one it is next to noise."""
        vectors[1 : 1 + len(self.rows)][self.rows[:, 2] != _NOTHING] = 0

    def first_vectors(self, size: int) -> torch.Tensor:
        """fp32 [parts, size]: random, but for words of parts nothing of their own."""
        vectors = SPREAD * torch.randn(self.parts, size, generator=torch.Generator().manual_seed(1))
        vectors[1 : 1 + len(self.rows)][self.rows[:, 3] != _NOTHING] = 0
        vectors[1 + len(self.rows) :] /= 3**0.5
        return vectors
