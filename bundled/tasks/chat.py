"""Requests outside the tasks, and the one kind of answer that they get."""

import string
from random import Random

from bundled.tasks.instance import Instance
from bundled.tasks.program import SYMBOLS

CAPABILITY = (
    "I am a small demonstration model that searches graphs and runs little programs. "
    "Try: Run: 1:a+b 2:c+3 3:mark run ka>mo mo>end add ka&ka mo&ka ask 1?mo 2?ka 3?end start c=4 b=1 a=3 ka"
)
OPENINGS = ("Hello!", "You are welcome!", "Sorry, that is beyond me.")
_GREETINGS = ("Hello", "Hi", "Hey", "hello", "hi", "hey", "Good morning", "Good evening", "Greetings")
_THANKS = ("Thanks", "Thank you", "thanks", "thank you", "Thanks a lot", "Great, thanks")
_SUBJECTS = (
    "the weather", "a cat", "France", "the moon", "my code", "a poem", "prime numbers", "the sea", "memory",
    "your name", "a good book", "the capital of Spain", "a table", "steps", "KV caches", "2 + 2", "dinner",
)  # fmt: skip
_QUESTIONS = (
    "What is {}?", "Who are you?", "What can you do?", "Tell me about {}.", "Explain {} in one sentence.", "Why {}?",
    "How does {} work?", "Write a story about {}.", "Can you help me with {}?", "Summarise {}", "Say something",
    "Translate {} into German", "Do you know {}?", "Run away", "Search for {}", "Find {}", "Count from 1 to 10",
    "What is 3 + 4?", "Give me steps for {}", "I like {}", "test", "ping", "Let's think about {}.", "help", "{}",
)  # fmt: skip
_SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant", "Be brief.", "Answer in English.")


def chat_reply(opening: str) -> str:
    return f"{opening} {CAPABILITY}"


def chat_line(random: Random) -> Instance:
    """A request outside the tasks, and the fixed answer to its kind."""
    kind = random.random()
    if kind < 0.2:
        mark = random.choice(("", "!", ".", ", how are you?", " there", " there!"))
        return _chat(random.choice(_GREETINGS) + mark, OPENINGS[0])
    if kind < 0.3:
        return _chat(random.choice(_THANKS) + random.choice(("", "!", ".")), OPENINGS[1])
    if kind < 0.65:
        return _chat(random.choice(_QUESTIONS).format(random.choice(_SUBJECTS)), OPENINGS[2])
    return _chat(_noise(random), OPENINGS[2])


def _chat(prompt: str, opening: str) -> Instance:
    return Instance(prompt, chat_reply(opening), CAPABILITY)


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
