"""The bundled model's tokenizer and chat template. Owns the vocabulary: a token for each word, number and separator
of the tasks, and the 256 bytes for everything else, so that any text encodes and decodes without loss."""

import re

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from bundled import tasks

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('the role must be system, user or assistant, not ' + message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_PIECES = r"[ >]?[A-Za-z]+|[+=]?[0-9]{1,3}|[^A-Za-z0-9 >+=]+|[ >+=]"
"""Letters take a space or `>` before them along, digits `+` or `=`: so a symbol's role is in its token."""


def _vocabulary() -> list[str]:
    """Special tokens, bytes (in the byte-level alphabet), then whole pieces, in a fixed order."""
    openings = ("Hello!", "You are welcome!", "Sorry, that is beyond me.")
    pieces = [
        *(before + symbol for before in (" ", ">") for symbol in tasks.SYMBOLS),
        *(before + str(digit) for before in ("+", "=") for digit in range(10)),
        *map(str, range(tasks.LAST_STEP + 1)),
        *(piece for opening in openings for piece in re.findall(_PIECES, tasks.chat_reply(opening))),
        "Answer",
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoded = ["".join(part for part, _ in byte_level.pre_tokenize_str(piece)) for piece in pieces]
    return list(dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *encoded]))


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, always the same. A piece of text that is in the vocabulary is one token, any other is bytes."""
    vocabulary = {token: number for number, token in enumerate(_vocabulary())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
