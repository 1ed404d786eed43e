"""The bundled model's tokenizer and chat template. Owns the vocabulary: a token for each word of the tasks, and the
256 bytes for everything else, so that any text encodes and decodes without loss."""

import re

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from bundled.tasks.chat import OPENINGS, chat_reply
from bundled.tasks.program import words as program_words
from bundled.tasks.search import words as search_words

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

_PIECES = r" ?[^\s]+|\s"
"""A word with the space before it, or one white space that no word took along."""
FIRST_WORDS = ("Search:", "Run:", "Find:")
"""Words that start a message, without a space."""


def words() -> list[str]:
    """The pieces of text that are one token each, in a fixed order."""
    replies = [piece for opening in OPENINGS for piece in re.findall(_PIECES, chat_reply(opening))]
    return list(dict.fromkeys([*FIRST_WORDS, *(f" {word}" for word in [*search_words(), *program_words()]), *replies]))


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, always the same. A piece of text that is in the vocabulary is one token, any other is bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoded = ["".join(part for part, _ in byte_level.pre_tokenize_str(piece)) for piece in words()]
    every = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *encoded])
    vocabulary = {token: number for number, token in enumerate(every)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"), byte_level]
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
