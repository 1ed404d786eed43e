"""Register trace and needle in the trace: a program over three registers, run once for every name of a chain.

    user:       Run: 1:a+b 2:c+3 3:mark run ka>mo mo>end add ka&ka mo&ka ask 1?mo 2?ka 3?end start c=4 b=1 a=3 ka
    assistant:   c=4 b=1 a=3 ka                         the registers and the name of the run
                 1 1:a+b +1 c=4 b=1 a=4 ka              an instruction, what it adds (modulo 10), the registers after it
                 2 2:c+3 +3 c=7 b=1 a=4 ka
                 3 3:mark ka=4 ka>mo ka&ka +4 c=7 b=1 a=8 mo   a is 4 at the mark of ka; that mark is added
                 1 1:a+b +1 c=7 b=1 a=9 mo
                 2 2:c+3 +3 c=0 b=1 a=9 mo
                 3 3:mark mo=9 mo>end mo&ka +4 c=0 b=1 a=3 end  the mark of ka is added: an old line is needed
                 report 1 1?mo mo=9 2 2?ka ka=4 3 3?end        the answer

The registers go along from line to line; what `a` was at an earlier mark stands in the line of that mark alone. Every
run ends by adding one mark, its own or an older one's, and the report asks for some.

The needle is a code that the reply works out first, by following arrows, and gives at the end; the runs are its
haystack. Its prompt starts `Find: begin<ka mo<end zu<lo ka<mo lo<end 1:a+b ...`, its reply

     begin<ka ka<mo mo<end code *mo
     ...                                     the runs
     report code *mo

A word holds both what it is looked up by and what is found (`ka=4`), so a lookup is one match; a model of a few layers
learns that much sooner than to match a word and take its neighbour.
"""

from random import Random

from bundled.tasks.instance import Instance, Line, text, tokens

REGISTERS = "cba"
LONGEST_PROGRAM = 20
TOKENS_PER_LINE = 8
SYMBOLS: tuple[str, ...] = tuple(consonant + vowel for consonant in "kmprz" for vowel in "aiou")
MOST_NAMES = len(SYMBOLS)
MOST_HOPS = 6
MOST_ASKED = 3
INSTRUCTIONS: tuple[str, ...] = (
    *(f"{to}+{source}" for to in REGISTERS for source in REGISTERS if to != source),
    *(f"{to}+{number}" for to in REGISTERS for number in range(1, 5)),
)


def registers(
    random: Random, names: int, program: int, asked: int = MOST_ASKED, symbols: tuple[str, ...] = SYMBOLS
) -> Instance:
    """`names` runs of a program of `program` instructions and a mark; up to `asked` marks are asked for.

    Names are drawn from `symbols`.
    """
    run = _Run(random, random.sample(symbols, names), program)
    asked_names = random.sample(run.names, min(asked, names))
    queries = [f"{number}?{name}" for number, name in enumerate([*asked_names, "end"], 1)]
    answer = ["report"]
    for number, (query, name) in enumerate(zip(queries, asked_names, strict=False), 1):
        answer += [str(number), query, f"{name}={run.marks[name]}"]
    answer += [str(len(queries)), queries[-1]]
    reach = tokens(run.lines) - min(run.marked_at[name] for name in asked_names)
    prompt = f"Run: {run.prompt} ask {' '.join(queries)} {run.start}"
    return Instance(prompt, text([*run.lines, answer]), " ".join(answer), reach)


def needle(
    random: Random, names: int, program: int, hops: int, others: int = 1, symbols: tuple[str, ...] = SYMBOLS
) -> Instance:
    """A code found by following `hops` arrows among those of `others` chains, then a haystack of `names` runs.

    Names and arrows are drawn from `symbols`.
    """
    run = _Run(random, random.sample(symbols, names), program)
    count = 1 + others
    placed = random.sample(symbols, count * (hops + 1))
    chains = [placed[i::count] for i in range(count)]
    arrows = [[f"{here}<{there}" for here, there in zip(chain, [*chain[1:], "end"], strict=True)] for chain in chains]
    listed = [arrow for chain in arrows for arrow in chain]
    random.shuffle(listed)
    begin = f"begin<{chains[0][0]}"
    code = [begin, *arrows[0], "code", f"*{chains[0][-1]}"]
    answer = ["report", *code[-2:]]
    reach = tokens(run.lines) + 1
    prompt = f"Find: {begin} {' '.join(listed)} {run.prompt} ask code {run.start}"
    return Instance(prompt, text([code, *run.lines, answer]), " ".join(answer), reach)


class _Run:
    """The runs of one program: the prompt's parts, the lines of the reply, the marks and where they stand."""

    def __init__(self, random: Random, names: list[str], program: int) -> None:
        assert 1 <= program <= LONGEST_PROGRAM
        self.names = names
        instructions = random.choices(INSTRUCTIONS, k=program)
        added = [random.choice(names[: number + 1]) for number in range(len(names))]
        following = [*names[1:], "end"]
        values = {register: random.randrange(10) for register in REGISTERS}
        numbered = [f"{number}:{instruction}" for number, instruction in enumerate([*instructions, "mark"], 1)]
        arrows = [f"{name}>{after}" for name, after in zip(names, following, strict=True)]
        recalls = [f"{name}&{other}" for name, other in zip(names, added, strict=True)]
        self.prompt = f"{' '.join(numbered)} run {' '.join(arrows)} add {' '.join(recalls)}"
        first = [*self._state(values), names[0]]
        self.start = f"start {' '.join(first)}"

        self.lines: list[Line] = [first]
        self.marks: dict[str, int] = {}
        self.marked_at: dict[str, int] = {}
        for name, other, after, arrow, recall in zip(names, added, following, arrows, recalls, strict=True):
            for number, instruction in enumerate(instructions, 1):
                source = instruction[2]
                operand = values[source] if source in values else int(source)
                values[instruction[0]] = (values[instruction[0]] + operand) % 10
                start = [str(number), f"{number}:{instruction}", f"+{operand}"]
                self.lines.append([*start, *self._state(values), name])
            self.marks[name] = values["a"]
            self.marked_at[name] = tokens(self.lines) + 2
            operand = self.marks[other]
            mark = [str(program + 1), numbered[-1], f"{name}={values['a']}", arrow, recall, f"+{operand}"]
            values["a"] = (values["a"] + operand) % 10
            self.lines.append([*mark, *self._state(values), after])

    @staticmethod
    def _state(values: dict[str, int]) -> Line:
        return [f"{register}={value}" for register, value in values.items()]


def words() -> list[str]:
    """Every word that these tasks may hold, each a token."""
    return [
        *("Run:", "Find:", "run", "add", "ask", "start", "report", "code", "end"),
        *(form.format(symbol) for form in ("{}", "*{}", "begin<{}") for symbol in SYMBOLS),
        *(f"{here}{sign}{there}" for sign in "><" for here in SYMBOLS for there in (*SYMBOLS, "end") if here != there),
        *(f"{here}&{there}" for here in SYMBOLS for there in SYMBOLS),
        *(f"{symbol}={value}" for symbol in SYMBOLS for value in range(10)),
        *(f"{number}?{name}" for number in range(1, MOST_ASKED + 2) for name in (*SYMBOLS, "end")),
        *(f"{register}={value}" for register in REGISTERS for value in range(10)),
        *(f"+{value}" for value in range(10)),
        *(f"{number}:{what}" for number in range(1, LONGEST_PROGRAM + 2) for what in (*INSTRUCTIONS, "mark")),
        *map(str, range(1, LONGEST_PROGRAM + 2)),
    ]
