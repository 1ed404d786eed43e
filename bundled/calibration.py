"""The bundled model's query statistics: `python -m bundled.calibration`. Owns the text they are averaged over."""

from collections.abc import Iterator
from random import Random

import torch

from bundled import MODEL, STATISTICS, tasks, tokenizer
from triattention.calibration import calibrate

DOCUMENTS = 120
TOKENS = 100_000


def calibration_text() -> Iterator[str]:
    """Conversations as the model sees them, chat template applied: the tasks by turns, 300 to 2,000 tokens a reply."""
    tokens = tokenizer.build()
    for number in range(DOCUMENTS):
        task = tasks.TASKS[number % len(tasks.TASKS)]
        low = Random(f"calibration {number}").choice((300, 600, 1_000))
        turn = tasks.instance(f"calibration {number}", task, number, low, 2 * low)
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
