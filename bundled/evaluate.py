"""Measures the bundled model with full attention: `python -m bundled.evaluate`.

A greedy reply is right to the last token exactly when, given the right reply so far, each next token is the most
likely one; so one forward pass over prompt and reply decides an instance, without generating.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from bundled import MODEL, tasks


def turn(tokens: PreTrainedTokenizerFast, instance: tasks.Instance) -> tuple[list[int], list[int]]:
    """Token ids of the rendered prompt and of the reply with its end of turn."""
    messages = [{"role": "user", "content": instance.prompt}]
    prompt = tokens.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    reply = tokens.encode(instance.reply, add_special_tokens=False)
    return tokens.encode(prompt, add_special_tokens=False), [*reply, tokens.eos_token_id]


def mixed_walk(seed: int, low: int, high: int) -> tasks.Instance:
    """A held-out walk of `low` to `high` tokens. Walks of one length all end at the same step, and whether the model
    sees that it must stop depends on that step's number: a figure at one length says little."""
    return tasks.held_out_walk(seed, Random(f"length {seed}").randint(low, high))


@torch.inference_mode()
def wrong_tokens(model: Qwen3ForCausalLM, tokens: PreTrainedTokenizerFast, instance: tasks.Instance) -> list[int]:
    """Places in the reply where the most likely token is another one."""
    prompt, reply = turn(tokens, instance)
    hidden = model.model(input_ids=torch.tensor([prompt + reply]), use_cache=False).last_hidden_state
    predicted = model.lm_head(hidden[0, len(prompt) - 1 : -1]).argmax(dim=-1)
    return torch.nonzero(predicted != torch.tensor(reply)).flatten().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--bounds", type=int, nargs="+", default=[10, 200, 600, 1200, 1500, 2000, 2400])
    parser.add_argument("--instances", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = AutoTokenizer.from_pretrained(arguments.model)
    model = Qwen3ForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    for low, high in pairwise(arguments.bounds):
        instances = [mixed_walk(seed, low, high) for seed in range(arguments.instances)]
        exact = sum(not wrong_tokens(model, tokens, instance) for instance in instances)
        print(f"walks of {low} to {high} tokens: {exact} of {len(instances)} exact to the last token", flush=True)


if __name__ == "__main__":
    main()
