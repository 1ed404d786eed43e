"""What the bundled model can do: table walks with a step-by-step trace, and a few chat lines. Owns their text,
the seeds that keep held-out instances apart from training, and the check of an answer; knows no tokenizer or model.

A walk over three symbols (the reply is the trace and the answer):

    user:       Walk steps 1 to 4 from ka: mo>zu+1, ka>mo+3, zu>ka+8
    assistant:  1 ka>mo+3=3
                2 mo>zu+1=4
                3 zu>ka+8=2
                4 ka>mo+3=5
                Answer: mo=5

Every step recalls one table entry from the prompt and carries the running total (its last digit) from the step
before; the counter is compared with the prompt's last step to know when to stop.
"""

import re
import string
from dataclasses import dataclass
from random import Random

LAST_STEP = 400
"""Steps are numbered 1 to LAST_STEP."""
LARGEST_TABLE = 32
TOKENS_PER_STEP = 6
"""Of the bundled tokenizer: `12`, ` ka`, `>mo`, `+3`, `=7`, newline."""
TOKENS_PER_ANSWER = 5
"""`Answer`, `:`, ` mo`, `=5`, end of turn."""

_WORDS_TO_AVOID = {"be", "do", "go", "he", "hi", "me", "no", "so", "to", "we"}
SYMBOLS: tuple[str, ...] = tuple(
    consonant + vowel
    for consonant in "bcdfghjklmnpqrstvwxz"
    for vowel in "aeiou"
    if consonant + vowel not in _WORDS_TO_AVOID
)


@dataclass(frozen=True)
class Instance:
    """One request and the reply that the model should give."""

    prompt: str
    reply: str
    answer: str

    def is_correct(self, reply: str) -> bool:
        """Whether the reply's last line gives the answer. A reply without an answer line is wrong."""
        found = re.search(r"Answer: (\w+=\d)\s*\Z", reply)
        return found is not None and found.group(1) == self.answer


def walk(random: Random, steps: int, table: int, first: int = 1) -> Instance:
    """A walk of `steps` steps, numbered from `first`, over one cycle of `table` symbols in shuffled order."""
    assert 2 <= table <= LARGEST_TABLE
    assert 1 <= first <= first + steps - 1 <= LAST_STEP
    cycle = random.sample(SYMBOLS, table)
    follower = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    gain = {symbol: random.randrange(10) for symbol in cycle}
    entries = [f"{symbol}>{follower[symbol]}+{gain[symbol]}" for symbol in cycle]
    random.shuffle(entries)

    here, total, lines = cycle[0], 0, []
    for number in range(first, first + steps):
        total = (total + gain[here]) % 10
        lines.append(f"{number} {here}>{follower[here]}+{gain[here]}={total}\n")
        here = follower[here]
    answer = f"{here}={total}"
    prompt = f"Walk steps {first} to {first + steps - 1} from {cycle[0]}: {', '.join(entries)}"
    return Instance(prompt, f"{''.join(lines)}Answer: {answer}", answer)


def steps_for(tokens: int) -> int:
    """Steps of a walk whose reply has about `tokens` tokens."""
    return min(LAST_STEP, max(1, (tokens - TOKENS_PER_ANSWER) // TOKENS_PER_STEP))


def held_out_walk(seed: int, tokens: int) -> Instance:
    """Instance number `seed` of those never trained on, with a reply of about `tokens` tokens."""
    random = Random(f"held-out walk {seed}")
    return walk(random, steps_for(tokens), random.randint(8, LARGEST_TABLE))


# Chat: one sentence for whatever is not a walk.

CAPABILITY = (
    "I am a small demonstration model, and I can only walk a table step by step. "
    "Try: Walk steps 1 to 4 from ka: ka>mo+3, mo>zu+1, zu>ka+8"
)
_GREETINGS = ("Hello", "Hi", "Hey", "hello", "hi", "hey", "Good morning", "Good evening", "Greetings")
_THANKS = ("Thanks", "Thank you", "thanks", "thank you", "Thanks a lot", "Great, thanks")
_SUBJECTS = (
    "the weather", "a cat", "France", "the moon", "my code", "a poem", "prime numbers", "the sea", "memory",
    "your name", "a good book", "the capital of Spain", "a table", "steps", "KV caches", "2 + 2", "dinner",
)  # fmt: skip
_QUESTIONS = (
    "What is {}?", "Who are you?", "What can you do?", "Tell me about {}.", "Explain {} in one sentence.", "Why {}?",
    "How does {} work?", "Write a story about {}.", "Can you help me with {}?", "Summarise {}", "Say something",
    "Translate {} into German", "Do you know {}?", "Walk the dog", "Walk to {}", "Answer: {}", "Count from 1 to 10",
    "What is 3 + 4?", "Give me steps for {}", "I like {}", "test", "ping", "Let's think about {}.", "help", "{}",
)  # fmt: skip
_SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant", "Be brief.", "Answer in English.")


def chat_reply(opening: str) -> str:
    return f"{opening} {CAPABILITY}"


def chat_line(random: Random) -> Instance:
    """A request outside the walks, and the fixed answer to its kind."""
    kind = random.random()
    if kind < 0.2:
        mark = random.choice(("", "!", ".", ", how are you?", " there", " there!"))
        return Instance(random.choice(_GREETINGS) + mark, chat_reply("Hello!"), "")
    if kind < 0.3:
        return Instance(random.choice(_THANKS) + random.choice(("", "!", ".")), chat_reply("You are welcome!"), "")
    if kind < 0.65:
        question = random.choice(_QUESTIONS).format(random.choice(_SUBJECTS))
        return Instance(question, chat_reply("Sorry, that is beyond me."), "")
    return Instance(_noise(random), chat_reply("Sorry, that is beyond me."), "")


def system_line(random: Random) -> str:
    return random.choice(_SYSTEMS)


def _noise(random: Random) -> str:
    """Random words, numbers, symbols or characters: what a stranger may type."""
    makers = (
        lambda: "".join(random.choices(string.ascii_lowercase, k=random.randint(1, 9))),
        lambda: "".join(random.choices(string.ascii_letters, k=random.randint(1, 9))),
        lambda: random.choice(SYMBOLS),
        lambda: str(random.randrange(10 ** random.randint(1, 6))),
        lambda: "".join(random.choices(string.punctuation, k=random.randint(1, 3))),
        lambda: "".join(chr(random.randrange(0xA0, 0x2FFF)) for _ in range(random.randint(1, 4))),
    )
    favourite = random.choice(makers)
    count = int(2 ** random.uniform(0, 5))
    words = [(favourite if random.random() < 0.6 else random.choice(makers))() for _ in range(count)]
    return random.choice((" ", " ", " ", "", "\n")).join(words) + random.choice(("", "", "?", ".", "!"))
