"""Trains the bundled model on the CPU: `python -m bundled.train --minutes N --out bundled/model`.

Owns the model's shape, the curriculum and the checkpoint. Batch number i depends on i alone, so a run that was
stopped goes on exactly where it was: run the same command again. The exported model is the average of the last
weights (exponential, in bf16), renewed as the run goes.
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bundled import tasks, tokenizer

GROWING, SMALL, STEPS = 1_200, 1_550, 2_600
"""Steps of training: tables grow up to the first, are small up to the second, then have all sizes."""
MATRIX_RATE = 0.02
"""Learning rate of the layers' matrices, by Muon: lookups in the prompt form about ten times sooner than with Adam."""
OTHER_RATE = 3e-3
"""Of embeddings and norms, by AdamW."""
BATCH_TOKENS = 2_000
IGNORED = -100


def model_config(vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype=torch.float32,
    )


@dataclass(frozen=True)
class Sample:
    """Token ids, their positions (a window deep in a trace keeps its own), and labels (IGNORED where not trained)."""

    tokens: list[int]
    positions: list[int]
    labels: list[int]


class Samples:
    """Training samples as tokens, from seeded randomness."""

    def __init__(self, tokens: PreTrainedTokenizerFast) -> None:
        self._tokens = tokens
        self._end = tokens.convert_tokens_to_ids(tokenizer.END)
        self._user = tokens.convert_tokens_to_ids(tokenizer.USER)
        self._system = tokens.convert_tokens_to_ids(tokenizer.SYSTEM)
        self._assistant = tokens.convert_tokens_to_ids(tokenizer.ASSISTANT)

    def _encode(self, text: str) -> list[int]:
        return self._tokens.encode(text, add_special_tokens=False)

    def _turn(self, instance: tasks.Instance) -> tuple[list[int], list[int]]:
        """The prompt up to the assistant's mark, and the reply with its end."""
        prompt = [self._user, *self._encode(instance.prompt), self._end, self._assistant]
        return prompt, [*self._encode(instance.reply), self._end]

    def _with_system(self, random: Random, prompt: list[int]) -> list[int]:
        if random.random() < 0.8:
            return prompt
        return [self._system, *self._encode(tasks.system_line(random)), self._end, *prompt]

    def whole(self, random: Random, steps: int, table: int, first: int = 1) -> Sample:
        """A walk from its first step to its end."""
        prompt, reply = self._turn(tasks.walk(random, steps, table, first))
        prompt = self._with_system(random, prompt)
        tokens = prompt + reply
        return Sample(tokens, list(range(len(tokens))), [IGNORED] * len(prompt) + reply)

    def window(self, random: Random, steps: int, table: int, shown: int) -> Sample:
        """The prompt and `shown` steps from somewhere in a walk of `steps`, at the positions they have in it.

        The first step shown is not trained on: what it follows from is not there.
        """
        prompt, reply = self._turn(tasks.walk(random, steps, table))
        gap = tasks.TOKENS_PER_STEP * random.randint(0, steps - shown)
        shown_tokens = reply[gap : gap + tasks.TOKENS_PER_STEP * shown + tasks.TOKENS_PER_ANSWER]
        start = len(prompt) + gap
        positions = [*range(len(prompt)), *range(start, start + len(shown_tokens))]
        unknown = tasks.TOKENS_PER_STEP if gap else 0
        labels = [IGNORED] * (len(prompt) + unknown) + shown_tokens[unknown:]
        return Sample(prompt + shown_tokens, positions, labels)

    def chat(self, random: Random) -> Sample:
        """One to three turns, chat lines mostly, now and then a short walk among them."""
        tokens: list[int] = []
        labels: list[int] = []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            if random.random() < 0.8:
                turn = tasks.chat_line(random)
            else:
                turn = tasks.walk(random, random.randint(1, 8), random.randint(2, 6))
            prompt, reply = self._turn(turn)
            tokens += prompt + reply
            labels += [IGNORED] * len(prompt) + reply
        system = self._with_system(random, [])
        tokens, labels = system + tokens, [IGNORED] * len(system) + labels
        return Sample(tokens, list(range(len(tokens))), labels)

    def batch(self, number: int) -> list[Sample]:
        """Batch `number` of the curriculum.

        First the tables grow: counting, totals and the lookup of the next symbol form. Then come walks of one
        lap over at most 5 entries: there nothing can be copied from an earlier lap, so that the lookup of the
        gain in the prompt forms too. Then walks of all kinds, every sixth batch a long one.
        """
        random = Random(f"training batch {number}")
        if number < GROWING:
            make = partial(self._any, random, grown=0.2 + 0.8 * number / GROWING)
        elif number < SMALL:
            make = partial(self._one_small_lap, random)
        elif number % 6 == 0:
            steps = random.randint(tasks.LAST_STEP // 3, tasks.LAST_STEP)
            return [self.whole(random, steps, random.randint(4, tasks.LARGEST_TABLE))]
        else:
            make = partial(self._any, random, grown=1.0)
        samples: list[Sample] = []
        while sum(len(sample.tokens) for sample in samples) < BATCH_TOKENS:
            samples.append(make())
        return samples

    def _one_small_lap(self, random: Random) -> Sample:
        size = random.randint(2, 5)
        return self.whole(random, size, size, random.randint(1, tasks.LAST_STEP - size + 1))

    def _any(self, random: Random, grown: float) -> Sample:
        """Chat, a whole walk, or a window of one; `grown` is the share of the full sizes."""
        kind = random.random()
        size = random.randint(2, round(tasks.LARGEST_TABLE * grown))
        if kind < 0.1:
            return self.chat(random)
        if kind < 0.5:
            steps = random.randint(1, round(32 * grown))
            return self.whole(random, steps, size, random.randint(1, tasks.LAST_STEP - steps + 1))
        shown = round(24 * grown)
        return self.window(random, random.randint(shown, tasks.LAST_STEP), size, shown)


def _tensors(samples: list[Sample], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded [samples, tokens] ids, positions and labels; causal attention never looks at the padding."""
    length = max(len(sample.tokens) for sample in samples)
    ids = torch.full((len(samples), length), pad)
    positions = torch.zeros((len(samples), length), dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORED)
    for row, sample in enumerate(samples):
        count = len(sample.tokens)
        ids[row, :count] = torch.tensor(sample.tokens)
        positions[row, :count] = torch.tensor(sample.positions)
        labels[row, :count] = torch.tensor(sample.labels)
    return ids, positions, labels


def _loss(model: Qwen3ForCausalLM, samples: list[Sample]) -> torch.Tensor:
    """Mean cross entropy in nats per trained token."""
    ids, positions, labels = _tensors(samples, model.config.pad_token_id)
    # An explicit mask of ones: without a mask, gaps in the positions would be read as separate sequences.
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
    targets = labels[:, 1:]
    trained = targets != IGNORED
    logits = model.lm_head(hidden.last_hidden_state[:, :-1][trained])
    return torch.nn.functional.cross_entropy(logits, targets[trained])


def _rate(step: int) -> float:
    """Share of the full learning rates: warm-up over 50 steps, then full, then down to 2 % over the last third."""
    return min(1.0, (step + 1) / 50, 0.02 + 2.94 * (1 - step / STEPS))


def export(weights: dict[str, torch.Tensor], config: Qwen3Config, out: Path) -> None:
    """Writes a model folder that transformers and vLLM load as it is."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.build().save_pretrained(out)
    settings = {**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    generation = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id, "temperature": 0.0}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {
        name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items() if "lm_head" not in name
    }
    part = out / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(out / "model.safetensors")


def train(minutes: float, out: Path, checkpoint: Path) -> None:
    """Trains until STEPS are done or `minutes` are over; resumes from `checkpoint` where it exists."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = tokenizer.build()
    config = model_config(len(tokens))
    model = Qwen3ForCausalLM(config)
    average = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [*model.model.embed_tokens.parameters(), *(w for w in model.parameters() if w.ndim == 1)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    rates = [MATRIX_RATE, OTHER_RATE]
    first, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average, first, spent = saved["average"], saved["step"], saved["seconds"]
    samples = Samples(tokens)
    start, recent, saved_at = time.monotonic(), [], time.monotonic()
    log = checkpoint.with_suffix(".jsonl")
    for step in range(first, STEPS):
        loss = _loss(model, samples.batch(step))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _rate(step)
            optimizer.step()
        decay = min(0.99, step / (step + 10))
        for name, weight in model.state_dict().items():
            average[name].lerp_(weight, 1 - decay)
        recent.append(loss.item())
        seconds = spent + time.monotonic() - start
        over = seconds - spent > 60 * minutes or step + 1 == STEPS
        if (step + 1) % 50 == 0 or over:
            line = {"step": step + 1, "seconds": round(seconds), "loss": round(sum(recent) / len(recent), 5)}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            recent = []
        if over or time.monotonic() - saved_at > 60:
            saved_at = time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "average": average,
                "step": step + 1,
                "seconds": seconds,
            }
            torch.save(state, checkpoint)
            export(average, config, out)
        if over:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45, help="stop after so many minutes; run again to go on")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "model", help="folder of the exported model"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("build/bundled.pt"), help="what a later run resumes from"
    )
    arguments = parser.parse_args()
    arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    train(arguments.minutes, arguments.out, arguments.checkpoint)


if __name__ == "__main__":
    main()
