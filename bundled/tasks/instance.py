"""One request and the reply that it should get. Owns how a reply is written and checked."""

from dataclasses import dataclass

Line = list[str]
"""The words of one line."""


@dataclass(frozen=True)
class Instance:
    """One request, the reply that the model should give, and the line of it that is scored."""

    prompt: str
    reply: str
    answer: str
    """The whole scored line, such as `stack =0 =3 =9`."""
    reach: int = 0
    """Tokens between the oldest generated token that the answer needs and the answer."""

    def is_correct(self, reply: str) -> bool:
        """Whether the reply's last line of the answer's kind is exactly the answer. A reply without one is wrong."""
        kind = self.answer.split()[0]
        lines = [line.split() for line in reply.splitlines()]
        found = [line for line in lines if line and line[0] == kind]
        return bool(found) and found[-1] == self.answer.split()


def text(lines: list[Line]) -> str:
    """Lines as text: a space before every word, so that a word is the same token wherever it stands."""
    return "".join(f" {' '.join(line)}\n" for line in lines)


def tokens(lines: list[Line]) -> int:
    """Tokens of `text(lines)` in the bundled tokenizer."""
    return sum(len(line) + 1 for line in lines)
