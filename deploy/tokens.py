"""Counts prompt tokens as the engine will: the model's own tokenizer and chat template."""

from typing import Any

from transformers import AutoTokenizer

_NOT_FROM_OUTSIDE = frozenset({"chat_template", "tokenize", "return_tensors", "return_dict", "tokenizer_kwargs"})


class ModelTokens:
    """Not for several threads at once: HF tokenizers keep truncation state."""

    def __init__(self, model: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)

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
            **more,
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
