"""Trains a model for the three tasks on the CPU: `python -m bundled.train --minutes N --out FOLDER`.

Owns the optimisers, the checkpoint and the log. Batch number i depends on i and on the level, which the checkpoint
keeps, so a run that was stopped goes on exactly where it was: run the same command again. The exported model is the
average of the last weights (exponential, in bf16), renewed as the run goes.
"""

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedTokenizerFast, Qwen3Config

from bundled import tokenizer
from bundled.curriculum import IGNORED, LENGTHS, Batch, Curriculum
from bundled.expected import unforeseen_reads
from bundled.muon import Muon
from bundled.network import Network, model_config
from bundled.words import Words, form

STEPS = 7_500
MASTERED = 0.015
"""Share of wrong tokens, averaged over some 30 batches of the level's length, below which the level rises."""
MATRIX_RATE = 0.02
"""Learning rate of the layers' matrices, by Muon: lookups in the prompt form about ten times sooner than with Adam."""
EMBEDDING_RATE = 3e-3
"""Of embeddings, by AdamW."""
NORM_RATE = 1e-2
"""Of norms, by AdamW: a lookup among many candidates needs large query and key norms."""
FIRST_QK_NORM = 1.5
"""First weights of query and key norms: at 1, the sharpest attention possible is still blurred over 100 tokens."""
END_WEIGHT = 5.0
"""Weight in the loss of the words of a search's last lines (`2^1`, `=2`): one in a hundred, and all must be right."""
VECTORS = "embed_tokens.parametrizations.weight.original"
"""Torch's name for what the embeddings are made of."""
FORESEE_EVERY = 3
"""Steps between two batches whose loss holds `unforeseen_reads`."""
FORESEE_FROM = 384
"""Tokens of a row from which on it does: a shorter one has hardly an old line."""
FORESEE_WEIGHT = 0.05


def export(weights: dict[str, torch.Tensor], config: Qwen3Config, out: Path) -> None:
    """Writes a model folder that transformers and vLLM load as it is. `weights` are named as in `Network`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.build().save_pretrained(out)
    settings = {**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    generation = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id, "temperature": 0.0}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {f"model.{name}": weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    part = out / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(out / "model.safetensors")


class Kinds:
    """Errors by kind of token: what stands before it and what it is, numbers and symbols left out."""

    def __init__(self, tokens: PreTrainedTokenizerFast) -> None:
        self._forms = [form(tokens.decode([number])) or "\\n" for number in range(len(tokens))]
        self._seen: Counter[str] = Counter()
        self._wrong: Counter[str] = Counter()

    def add(self, before: torch.Tensor, targets: torch.Tensor, wrong: torch.Tensor) -> None:
        for one, other, miss in zip(before.tolist(), targets.tolist(), wrong.tolist(), strict=True):
            kind = f"{self._forms[one]} {self._forms[other]}"
            self._seen[kind] += 1
            self._wrong[kind] += miss

    def worst(self, count: int = 12) -> dict[str, str]:
        """The kinds with the most errors, as `wrong/seen`; starts anew."""
        worst = {kind: f"{wrong}/{self._seen[kind]}" for kind, wrong in self._wrong.most_common(count) if wrong}
        self._seen.clear()
        self._wrong.clear()
        return worst


class Trainer:
    """Network, optimisers and averaged weights of a run, and their checkpoint."""

    def __init__(self, tokens: PreTrainedTokenizerFast, compile: bool) -> None:
        torch.manual_seed(0)
        self.config = model_config(len(tokens))
        self.network, self.words = Network(self.config), Words(tokens)
        with torch.no_grad():
            register_parametrization(self.network.embed_tokens, "weight", self.words, unsafe=True)
            vectors = self.network.get_parameter(VECTORS)
            vectors.copy_(self.words.first_vectors(self.config.hidden_size))
            for name, weight in self.network.named_parameters():
                if "q_norm" in name or "k_norm" in name:
                    weight.fill_(FIRST_QK_NORM)
        self.forward = torch.compile(self.network, dynamic=True) if compile else self.network
        self.average = {name: weight.detach().clone() for name, weight in self.network.state_dict().items()}
        matrices = [weight for weight in self.network.layers.parameters() if weight.ndim == 2]
        norms = [weight for weight in self.network.parameters() if weight.ndim == 1]
        self.optimizers = [
            Muon(matrices, MATRIX_RATE),
            torch.optim.AdamW([vectors], betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.AdamW(norms, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.vocabulary = tokens.get_vocab()
        self.weights = torch.ones(len(tokens))
        for word, row in self.vocabulary.items():
            if re.fullmatch(r"Ġ(\d+\^\d+|=\d+)", word):
                self.weights[row] = END_WEIGHT
        self.step, self.seconds = 0, 0.0
        self.level, self.wrong, self.unforeseen = 0, 1.0, 2.0

    def start_from(self, model: Path) -> None:
        """Takes over a model's weights, its embeddings by words. Lookups are there, so long rows come at once."""
        weights = load_file(model / "model.safetensors")
        rows = PreTrainedTokenizerFast.from_pretrained(model).get_vocab()
        table = weights.pop("model.embed_tokens.weight").float()
        embeddings = self.words(self.network.get_parameter(VECTORS)).detach().clone()
        for word, row in self.vocabulary.items():
            if word in rows:
                embeddings[row] = table[rows[word]]
        with torch.no_grad():
            vectors = self.words.right_inverse(embeddings)
            self.words.forget_pairs(vectors)
            self.network.get_parameter(VECTORS).copy_(vectors)
            for name, weight in weights.items():
                self.network.get_parameter(name.removeprefix("model.")).copy_(weight)
        self.average = {name: weight.detach().clone() for name, weight in self.network.state_dict().items()}
        self.level = len(LENGTHS) - 2

    def train(self, batch: Batch, rate: float, kinds: Kinds | None) -> float:
        """One step at `rate` times the learning rates; the mean loss in nats per trained token.

        Raises the level where it has been mastered. Computes in bf16 where the CPU has instructions for it: without
        them its matrix products take twenty times as long as in fp32.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            hidden, reads = self.forward(batch.ids, batch.positions)
            targets = batch.labels[:, 1:]
            trained = targets != IGNORED
            logits = torch.nn.functional.linear(hidden[:, :-1][trained], self.network.embed_tokens.weight)
        loss = cross_entropy(logits.float(), targets[trained], self.weights)
        wrong = logits.argmax(dim=-1) != targets[trained]
        if kinds is not None:
            kinds.add(batch.ids[:, :-1][trained], targets[trained], wrong)
        if batch.ids.shape[1] == LENGTHS[self.level]:
            self.wrong += 0.03 * (wrong.float().mean().item() - self.wrong)
            if self.wrong < MASTERED and self.level + 1 < len(LENGTHS):
                self.level, self.wrong = self.level + 1, 0.1
        total = loss
        if self.step % FORESEE_EVERY == 0 and batch.ids.shape[1] >= FORESEE_FROM:
            unforeseen = unforeseen_reads(reads, batch, self.network)
            self.unforeseen += 0.03 * (unforeseen.item() - self.unforeseen)
            total = loss + FORESEE_WEIGHT * unforeseen
        self.network.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer, full in zip(self.optimizers, (MATRIX_RATE, EMBEDDING_RATE, NORM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = full * rate
            optimizer.step()
        decay = min(0.99, self.step / (self.step + 10))
        for name, weight in self.network.state_dict().items():
            self.average[name].lerp_(weight, 1 - decay)
        self.step += 1
        return loss.item()

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights, under Qwen3's names."""
        weights = dict(self.average)
        vectors = weights.pop(VECTORS)
        return weights | {"embed_tokens.weight": self.words(vectors)}

    def save(self, checkpoint: Path) -> None:
        state = {
            "model": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
            "level": self.level,
            "wrong": self.wrong,
            "unforeseen": self.unforeseen,
        }
        part = checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(checkpoint)

    def load(self, checkpoint: Path) -> None:
        saved = torch.load(checkpoint, weights_only=True)
        self.network.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.average, self.step, self.seconds = saved["average"], saved["step"], saved["seconds"]
        self.level, self.wrong, self.unforeseen = saved["level"], saved["wrong"], saved["unforeseen"]


def rate(step: int, steps: int) -> float:
    """Share of the full learning rates: warm-up over 50 steps, then full, then down to 2 % over the last 40 %."""
    return min(1.0, (step + 1) / 50, 0.02 + 2.45 * (1 - step / steps))


def train(
    minutes: float, steps: int, start_from: Path | None, out: Path, checkpoint: Path, compile: bool, threads: int
) -> None:
    """Trains until `steps` are done or `minutes` are over; resumes from `checkpoint` where it exists.

    A new run begins with the weights of `start_from`, or with nothing.
    """
    torch.set_num_threads(threads)
    tokens = tokenizer.build()
    trainer = Trainer(tokens, compile)
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"{checkpoint} is of an earlier run, which goes on from its step {trainer.step:,}.", flush=True)
        if start_from is not None:
            print(f"Nothing is taken from {start_from}: for a new run, remove {checkpoint} or set --checkpoint.")
    elif start_from is not None:
        trainer.start_from(start_from)
    curriculum, kinds = Curriculum(tokens), Kinds(tokens)
    log = checkpoint.with_suffix(".jsonl")
    before, start, saved_at = trainer.seconds, time.monotonic(), time.monotonic()
    recent: list[float] = []
    while trainer.step < steps:
        look = trainer.step % 5 == 0
        batch = curriculum.batch(trainer.step, trainer.level)
        recent.append(trainer.train(batch, rate(trainer.step, steps), kinds if look else None))
        now = time.monotonic()
        trainer.seconds = before + now - start
        over = now - start > 60 * minutes or trainer.step == steps
        if trainer.step % 50 == 0 or over:
            line = {
                "step": trainer.step,
                "seconds": round(trainer.seconds),
                "loss": round(sum(recent) / len(recent), 5),
                "level": trainer.level,
                "wrong_at_level": round(trainer.wrong, 5),
                "unforeseen": round(trainer.unforeseen, 3),
            }
            with log.open("a") as file:
                file.write(json.dumps({**line, "wrong": kinds.worst()}, ensure_ascii=False) + "\n")
            print(line, flush=True)
            recent = []
        if over or now - saved_at > 90:
            saved_at = now
            trainer.save(checkpoint)
            export(trainer.averaged(), trainer.config, out)
        if over:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=180, help="stop after so many minutes; run again to go on")
    parser.add_argument("--steps", type=int, default=STEPS, help="length of the whole run")
    parser.add_argument("--start-from", type=Path, help="folder of a model to begin with instead of from nothing")
    parser.add_argument("--out", type=Path, default=Path("build/bundled"), help="folder of the exported model")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("build/bundled.pt"), help="what a later run resumes from"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    arguments = parser.parse_args()
    arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    train(
        arguments.minutes,
        arguments.steps,
        arguments.start_from,
        arguments.out,
        arguments.checkpoint,
        not arguments.no_compile,
        arguments.threads,
    )


if __name__ == "__main__":
    main()
