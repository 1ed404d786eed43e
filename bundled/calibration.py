"""The bundled model's query statistics: `python -m bundled.calibration`. Owns the text they are averaged over."""

from collections.abc import Iterator
from random import Random

import torch

from bundled import MODEL, STATISTICS, tasks, tokenizer
from triattention.calibration import calibrate

DOCUMENTS = 120
TOKENS = 100_000


def calibration_text(documents: int = DOCUMENTS) -> Iterator[str]:
    """Conversations as the model sees them, chat template applied: walks of up to 300 steps, and small talk."""
    tokens = tokenizer.build()
    for number in range(documents):
        random = Random(f"calibration {number}")
        if number % 8 == 0:
            turn = tasks.chat_line(random)
        else:
            turn = tasks.walk(random, random.randint(20, 300), random.randint(4, tasks.LARGEST_TABLE))
        messages = [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.reply}]
        text = tokens.apply_chat_template(messages, tokenize=False)
        assert isinstance(text, str)
        yield text


def main() -> None:
    torch.set_num_threads(1)
    statistics = calibrate(MODEL, calibration_text(), STATISTICS, max_tokens=TOKENS)
    print(f"{STATISTICS.name}: means over {statistics.tokens} tokens")


if __name__ == "__main__":
    main()
