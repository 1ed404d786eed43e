"""Counts prompt tokens as the engine will: the model's own tokenizer and chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

_NOT_FROM_OUTSIDE = frozenset({"chat_template", "tokenize", "return_tensors", "return_dict", "tokenizer_kwargs"})


class ModelTokens:
    """Not for several threads at once: HF tokenizers keep truncation state."""

    def __init__(self, engine_arguments: Mapping[str, Any]) -> None:
        """`engine_arguments`: of `vllm serve`, by their Python names; those that say which tokenizer and template."""
        given = engine_arguments.get
        self._tokenizer = AutoTokenizer.from_pretrained(
            given("tokenizer") or given("model"), revision=given("tokenizer_revision") or given("revision")
        )
        self._template_values = given("default_chat_template_kwargs") or {}
        if template := given("chat_template"):
            # A file's name or the template itself, as vLLM has it.
            is_file = "{" not in template
            self._tokenizer.chat_template = Path(template).read_text() if is_file else template

    def chat(self, body: dict[str, Any]) -> int:
        """Raises whatever the template raises for messages that it cannot render, and ValueError for a request's own
        template: that is a program, and vLLM refuses it as well."""
        more = body.get("chat_template_kwargs") or {}
        if body.get("chat_template") is not None or not _NOT_FROM_OUTSIDE.isdisjoint(more):
            raise ValueError(f"chat_template_kwargs may not name {', '.join(sorted(_NOT_FROM_OUTSIDE))}")
        text = self._tokenizer.apply_chat_template(
            [_flattened(message) for message in body["messages"]],
            tools=body.get("tools"),
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
            tokenize=False,
            **{**self._template_values, **more},
        )
        # The template wrote the special tokens already.
        return self._count(text, add_special_tokens=False)

    def text(self, text: str) -> int:
        return self._count(text, add_special_tokens=True)

    def _count(self, text: str, add_special_tokens: bool) -> int:
        return len(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _flattened(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's list of text parts as one string, as vLLM hands it to templates that expect a string."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}
