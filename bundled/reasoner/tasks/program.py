"""Register trace and needle in the trace: a program over three registers, run once for every name of a list.

    user:       Run: do a+b c+7 . for ka mo . add ka- ka+ ka& mo+ . report mo? ka? . start c=4 b=1 a=3 now go
    assistant:   c=4 b=1 a=3 ka a+b +1       the registers, the run, the next instruction, and what it adds (modulo 10)
                 c=4 b=1 a=4 ka c+7 +7
                 c=1 b=1 a=4 ka: ka- +0      the run for ka is over: a mark; ka- adds nothing
                 c=1 b=1 a=4 mo a+b +1
                 c=1 b=1 a=5 mo c+7 +7
                 c=8 b=1 a=5 mo: ka& +4      ka& adds what a was at the mark of ka
                 report mo? a=5 ka? a=4 .    the answer

The registers go along from line to line; what `a` was at an earlier mark stands there alone. Most runs end by adding
one such value, and the report asks for some.

The needle is a code that the reply works out first, by following arrows, and gives at the end; the runs are its
haystack. `mo< <ka` is an arrow from ka to mo. Its prompt starts `Find: arrows lo< <pi mo< <ka zu< <mo end <zu end <lo
begin <ka do ...`, its reply

     begin <ka mo< <mo zu< <zu end
     *zu code start c=4 b=1 a=3 now go .
     ...                                     the runs
     report code? *zu .

What is looked up stands before what it is looked up by (a value before its mark, a target before its source): a small
model learns to match a word with its like much sooner than with the word before it.
"""

from random import Random

from bundled.reasoner.tasks.instance import Instance, Line, text, tokens

REGISTERS = "cba"
LONGEST_PROGRAM = 24
TOKENS_PER_LINE = 7
SYMBOLS: tuple[str, ...] = tuple(consonant + vowel for consonant in "bklmprvz" for vowel in "aiou")
MOST_NAMES = len(SYMBOLS)
MOST_HOPS = len(SYMBOLS) // 3 - 1
INSTRUCTIONS: tuple[str, ...] = (
    *(f"{to}+{source}" for to in REGISTERS for source in REGISTERS if to != source),
    *(f"{to}+{number}" for to in REGISTERS for number in range(1, 10)),
)


def registers(random: Random, names: int, program: int, asked: int, pool: int = len(SYMBOLS)) -> Instance:
    """`names` runs of a program of `program` instructions; `asked` marks are asked for.

    Names are drawn from the first `pool` symbols.
    """
    run = _Run(random, random.sample(SYMBOLS[: max(pool, names)], names), program)
    asked_names = random.sample(run.names, min(asked, names))
    prompt = f"Run: {run.prompt} report {' '.join(f'{name}?' for name in asked_names)} . {run.start}"
    lines = run.lines
    answer = ["report", *(word for name in asked_names for word in (f"{name}?", f"a={run.marks[name]}")), "."]
    reach = tokens(lines) - min(run.marked_at[name] for name in asked_names)
    return Instance(prompt, text([*lines, answer]), " ".join(answer), reach)


def needle(random: Random, names: int, program: int, hops: int, others: int = 2, pool: int = len(SYMBOLS)) -> Instance:
    """A code found by following `hops` arrows among those of `others` chains, then a haystack of `names` runs.

    Names and arrows are drawn from the first `pool` symbols.
    """
    run = _Run(random, random.sample(SYMBOLS[: max(pool, names)], names), program)
    count = 1 + others
    symbols = random.sample(SYMBOLS[: max(pool, count * (hops + 1))], count * (hops + 1))
    chains = [symbols[i::count] for i in range(count)]
    pairs = [
        f"{there}< <{here}" if there else f"end <{here}"
        for chain in chains
        for here, there in zip(chain, [*chain[1:], ""], strict=True)
    ]
    random.shuffle(pairs)
    chain = chains[0]
    prompt = f"Find: arrows {' '.join(pairs)} begin <{chain[0]} {run.prompt} report code? . {run.start}"
    found: Line = ["begin", f"<{chain[0]}"]
    for symbol in chain[1:]:
        found += [f"{symbol}<", f"<{symbol}"]
    code = [f"*{chain[-1]}", "code", *run.start.split(), "."]
    answer = ["report", "code?", f"*{chain[-1]}", "."]
    reach = tokens([code, *run.lines])
    return Instance(prompt, text([[*found, "end"], code, *run.lines, answer]), " ".join(answer), reach)


class _Run:
    """The runs of one program: the prompt's parts, the lines of the reply, the marks and where they stand."""

    def __init__(self, random: Random, names: list[str], program: int) -> None:
        assert 1 <= program <= LONGEST_PROGRAM
        self.names = names
        instructions = random.sample(INSTRUCTIONS, program)
        values = {register: random.randrange(10) for register in REGISTERS}
        self.start = f"start {self._state(values)} now go"
        recalls = _recalls(random, names)
        pairs = " ".join(f"{recall} {name}+" for name, recall in zip(names, recalls, strict=True))
        self.prompt = f"do {' '.join(instructions)} . for {' '.join(names)} . add {pairs} ."

        self.lines: list[Line] = []
        self.marks: dict[str, int] = {}
        self.marked_at: dict[str, int] = {}
        for name, recall in zip(names, recalls, strict=True):
            for instruction in instructions:
                source = instruction[2]
                operand = values[source] if source in values else int(source)
                self.lines.append([*self._state(values).split(), name, instruction, f"+{operand}"])
                values[instruction[0]] = (values[instruction[0]] + operand) % 10
            self.marks[name] = values["a"]
            self.marked_at[name] = tokens(self.lines)
            operand = self.marks[recall[:-1]] if recall.endswith("&") else 0
            self.lines.append([*self._state(values).split(), f"{name}:", recall, f"+{operand}"])
            values["a"] = (values["a"] + operand) % 10

    @staticmethod
    def _state(values: dict[str, int]) -> str:
        return " ".join(f"{register}={value}" for register, value in values.items())


def _recalls(random: Random, names: list[str]) -> list[str]:
    """For each name the earlier mark that its run adds, `ka&`, or its own `ka-` where it adds none.

    No mark is added twice.
    """
    recalls: list[str] = []
    unused: list[str] = []
    for name in names:
        if unused and random.random() < 0.6:
            recalls.append(f"{unused.pop(random.randrange(len(unused)))}&")
        else:
            recalls.append(f"{name}-")
        unused.append(name)
    return recalls


def words() -> list[str]:
    """Every word that these tasks may hold, each a token."""
    return [
        *(
            "Run:",
            "Find:",
            "do",
            "for",
            "add",
            "report",
            "start",
            "now",
            "go",
            ".",
            "arrows",
            "end",
            "begin",
            "code",
            "code?",
        ),
        *(form.format(s) for form in ("{}", "{}:", "{}+", "{}&", "{}-", "{}?", "{}<", "<{}", "*{}") for s in SYMBOLS),
        *(f"{register}={value}" for register in REGISTERS for value in range(10)),
        *(f"+{value}" for value in range(10)),
        *INSTRUCTIONS,
    ]
