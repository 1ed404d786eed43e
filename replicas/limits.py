"""How much one request may ask for, whatever the model: the settings, and the sentences for what exceeds them.

The router checks every body with this; a replica checks those that come to it without a reservation, because HAProxy
sends by itself while no router answers. Prompt and output tokens are bounded elsewhere, by the model and the tier.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from replicas.headers import PREFIX, Answer

BODY_BYTES = 1024 * 1024
"""HAProxy's buffers are made for it (`deploy/haproxy.py`)."""


class RequestLimits(BaseModel):
    """The most that one request may have of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_bytes: int = Field(default=BODY_BYTES, ge=1, le=BODY_BYTES)
    header_bytes: int = Field(default=16 * 1024, ge=256, description="names and values together")
    messages: int = Field(default=2048, ge=1, description="of one chat")
    prompts: int = Field(default=64, ge=1, description="of one completion")
    choices: int = Field(default=16, ge=1, description="n")
    output_tokens: int | None = Field(default=None, ge=1, description="max_tokens; null: the model's or the tier's")
    stop_strings: int = Field(default=4, ge=0, description="vLLM itself takes 4 at most")
    stop_string_characters: int = Field(default=256, ge=1)
    logprobs: int = Field(default=20, ge=0, description="alternatives per token, of output or prompt")
    body_seconds: float = Field(default=30.0, gt=0, description="to send the whole request")
    request_seconds: float = Field(default=7200.0, gt=0, description="from its arrival at a replica to its end")


_ROUTERS = PREFIX.encode()


def check_headers(headers: list[tuple[bytes, bytes]], limits: RequestLimits) -> Answer | None:
    size = sum(len(name) + len(value) for name, value in headers if not name.startswith(_ROUTERS))
    if size <= limits.header_bytes:
        return None
    return Answer(
        431,
        "RequestHeaderFieldsTooLargeError",
        f"The headers have {size} bytes, but limits.header_bytes is {limits.header_bytes}: send fewer or shorter ones.",
    )


def check_size(size: int, limits: RequestLimits) -> Answer | None:
    if size <= limits.body_bytes:
        return None
    return Answer(
        413,
        "RequestEntityTooLargeError",
        f"The request body has more than {limits.body_bytes} bytes (limits.body_bytes): shorten the prompt.",
    )


def check_body(body: dict[str, Any], limits: RequestLimits) -> Answer | None:
    """The first limit that the body exceeds. What is of a wrong type is left to vLLM, which names what it expects."""
    for field, size, limit, what in (
        ("messages", _length(body.get("messages")), "messages", "messages"),
        ("prompt", _prompts(body.get("prompt")), "prompts", "prompts"),
        ("n", _number(body.get("n")), "choices", "choices"),
        ("best_of", _number(body.get("best_of")), "choices", "choices"),
        ("stop", _length(body.get("stop")), "stop_strings", "stop strings"),
        ("stop", _longest(body.get("stop")), "stop_string_characters", "characters in one stop string"),
        ("logprobs", _number(body.get("logprobs")), "logprobs", "logprobs"),
        ("top_logprobs", _number(body.get("top_logprobs")), "logprobs", "logprobs"),
        ("prompt_logprobs", _number(body.get("prompt_logprobs")), "logprobs", "logprobs"),
        *(
            (field, _number(body.get(field)), "output_tokens", "output tokens")
            for field in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
        ),
    ):
        most = getattr(limits, limit)
        if most is not None and size > most:
            message = f"{field} asks for {_short(size)} {what}, but limits.{limit} is {most}: send at most {most}."
            return Answer(400, "BadRequestError", message, field)
    if not isinstance(body.get("structured_outputs", {}), dict | None):
        # vLLM's own check stumbles over it: 500.
        return Answer(400, "BadRequestError", "structured_outputs is not an object: send {...}.", "structured_outputs")
    items = body.get("input")
    for index, item in enumerate(items if isinstance(items, list) else []):
        if _lacks_text(item):  # vLLM takes the text of its first part without a look: 500
            message = f"input[{index}] is an answer of the assistant without text: leave it out."
            return Answer(400, "BadRequestError", message, "input")
    return None


def _lacks_text(item: Any) -> bool:
    """Of a response's input: is it a former answer that has no text at its beginning?"""
    if not isinstance(item, dict) or item.get("role") != "assistant" or not isinstance(item.get("content"), list):
        return False
    content = item["content"]
    return not content or (isinstance(content[0], dict) and content[0].get("type") == "refusal")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _prompts(value: Any) -> int:
    """A list of token ids is one prompt."""
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 0


def _longest(value: Any) -> int:
    texts = value if isinstance(value, list) else [value]
    return max((len(text) for text in texts if isinstance(text, str)), default=0)


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _short(number: int) -> str:
    return str(number) if number < 10**18 else "more than 10^18"
