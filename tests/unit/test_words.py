"""Embeddings made of parts: what is learned of some pairs of numbers holds for all."""

import pytest
import torch

from bundled import tokenizer
from bundled.words import Words, form

TOKENS = tokenizer.build()
SIZE = 8


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(TOKENS)


def row(word: str) -> int:
    (number,) = TOKENS.encode(word, add_special_tokens=False)
    return number


def test_first_embeddings_add_up_by_form_first_and_last_part(words: Words) -> None:
    table = words(words.first_vectors(SIZE))
    one, other = table[row(" 3>7")] - table[row(" 3-7")], table[row(" 21>4")] - table[row(" 21-4")]
    torch.testing.assert_close(one, other)  # the two forms
    torch.testing.assert_close(table[row(" 3>7")] - table[row(" 3>9")], table[row(" 7?")] - table[row(" 9?")])
    torch.testing.assert_close(table[row(" ka=4")] - table[row(" mo=4")], table[row(" ka>ru")] - table[row(" mo>ru")])
    assert len(table.unique(dim=0)) == len(TOKENS)


def test_a_pair_that_was_never_seen_learns_from_the_others(words: Words) -> None:
    vectors = torch.zeros_like(words.first_vectors(SIZE)).requires_grad_()
    words(vectors)[[row(" 3>7"), row(" 12>9")]].sum().backward()
    learned = words(vectors.grad)[:, 0]
    assert learned[row(" 3>9")] == 4  # the form twice, its first and its last number
    assert learned[row(" 12>7")] == 4
    assert learned[row(" 3>7")] == 5  # and its own
    assert learned[row(" 1-2")] == 0


def test_any_embeddings_have_vectors(words: Words) -> None:
    table = torch.randn(len(TOKENS), SIZE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(words(words.right_inverse(table)), table)


def test_what_pairs_share_outlives_their_own(words: Words) -> None:
    shared = words.first_vectors(SIZE)
    vectors = shared.clone()
    vectors[1 + row(" 3>7")] = 1.0  # its own vector
    table = words(vectors)
    refitted = words.right_inverse(table)
    words.forget_pairs(refitted)
    difference = words(refitted) - words(shared)
    assert difference[row(" 3>7")].abs().max() < 0.2 < (table - words(shared))[row(" 3>7")].abs().max()
    torch.testing.assert_close(words(refitted)[row(" at")], table[row(" at")])


@pytest.mark.parametrize(
    ("word", "expected"), [(" 3>17", "N>N"), (" 4:mark", "N:mark"), (" ka&mo", "S&S"), (" at", "at")]
)
def test_the_form_of_a_word(word: str, expected: str) -> None:
    assert form(word) == expected
