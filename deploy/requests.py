"""Reads a request's body: what is wrong with it, or what it will ask of a replica. Pure, no Ray, no HTTP.

Judges only what placement needs (the model's name, the prompt, the output limit). Every other field is vLLM's
to check, so a prompt that cannot be counted here is admitted with an estimate of it.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol

from deploy.affinity import prefix_hashes
from deploy.messages import Demand
from deploy.tiers import Tier
from replicas.access import Tenant
from replicas.endpoints import CHAT, Endpoint
from replicas.headers import Answer
from replicas.limits import RequestLimits, check_body, check_size


class TokenCounter(Protocol):
    def chat(self, body: dict[str, Any]) -> int:
        """Tokens of the prompt that the chat template makes of `body["messages"]`."""
        ...

    def text(self, text: str) -> int: ...


@dataclass(frozen=True)
class Served:
    model: str
    max_model_len: int


@dataclass(frozen=True)
class Admissible:
    demand: Demand
    output_limit: int | None = None
    """Tokens: what the replica must put into a body that has no limit, or a higher one than its tier allows, which vLLM
    does not know."""


def examine(
    raw: bytes,
    endpoint: Endpoint,
    reservation: str,
    served: Served,
    counter: TokenCounter,
    tenant: Tenant,
    tier: Tier,
    limits: RequestLimits,
) -> Admissible | Answer:
    """The demand of a request of `tenant`, whose tier is `tier`, or the answer that refuses it."""
    limit = _Limit("max_model_len", served.max_model_len)
    if tier.max_context_tokens is not None and tier.max_context_tokens < limit.tokens:
        limit = _Limit(f"max_context_tokens of tier {tenant.tier}", tier.max_context_tokens)
    if refused := check_size(len(raw), limits):
        return refused
    try:
        body = _body(raw)
        if refused := check_body(body, limits):
            return refused
        _check_model(body, served)
        if endpoint.prompt not in body:
            raise _Wrong(endpoint.prompt_missing, endpoint.prompt)
        limit_name, asked = _output_limit(body, endpoint)
        prompts = _prompt_tokens(body, endpoint, counter)
        sequences = (_whole_number(body, "n") or 1) * (1 if prompts is None else len(prompts))
        if prompts is None:
            prompt = _estimate(body, raw, endpoint, counter)
            if limit.tokens < served.max_model_len:  # else vLLM, which knows better, will refuse it
                _check_length(prompt, asked, limit_name, limit, about="about ")
            prompt = min(prompt, limit.tokens - 1)
        else:
            prompt = _truncated(max(prompts), body, served)
            _check_length(prompt, asked, limit_name, limit)
    except _Wrong as wrong:
        return wrong.answer
    output = (endpoint.default_output or limit.tokens) if asked is None else max(asked, 1)
    total = min(prompt + output, limit.tokens)
    demand = Demand(
        reservation,
        prompt,
        total,
        sequences,
        priority=tier.priority,
        tier=tenant.tier,
        tenant=tenant.name,
        prefix=prefix_hashes(_beginning(body, endpoint)),
    )
    is_cut = limit.tokens < served.max_model_len and (asked is None or prompt + asked > limit.tokens)
    return Admissible(demand, output_limit=total - prompt if is_cut else None)


@dataclass(frozen=True)
class _Limit:
    """Most tokens of prompt and output, and what says so."""

    name: str
    tokens: int


class _Wrong(Exception):
    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        kind = "NotFoundError" if status == 404 else "BadRequestError"
        self.answer = Answer(status, kind, message, param)


def _body(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except UnicodeDecodeError:
        raise _Wrong("The request body is not valid JSON: it is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _Wrong(f"The request body is not valid JSON: {error.msg} at {where}.") from None
    except ValueError:
        raise _Wrong("The request body is not usable JSON: it holds a number of too many digits.") from None
    except RecursionError:
        raise _Wrong("The request body is not usable JSON: it is nested too deeply.") from None
    if not isinstance(body, dict):
        raise _Wrong("The request body is not a JSON object: send {...} with the request's fields.")
    return body


def _check_model(body: dict[str, Any], served: Served) -> None:
    model = body.get("model")
    if model is not None and model != served.model:
        named = model if isinstance(model, str) else json.dumps(model)
        message = f"The model `{named[:100]}` does not exist: this fleet serves `{served.model}`."
        raise _Wrong(message, "model", 404)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise _Wrong("messages is empty or not a list: a chat completion needs at least one message.", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Wrong(f"messages[{index}] is not a message: each is an object with a role and content.", "messages")


def _whole_number(body: dict[str, Any], name: str, least: int = 1) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _Wrong(f"{name} is {json.dumps(value)[:50]}: it must be a whole number of at least {least}.", name)
    return value


def _output_limit(body: dict[str, Any], endpoint: Endpoint) -> tuple[str, int | None]:
    """The field that counts, and its tokens. 0 is for a completion that only scores its prompt."""
    name = next((name for name in endpoint.output_limits if body.get(name) is not None), endpoint.output_limits[-1])
    return name, _whole_number(body, name, least=0 if body.get("echo") is True else 1)


def _prompt_fields(body: dict[str, Any], endpoint: Endpoint) -> list[Any]:
    return [body.get(name) for name in (*endpoint.more_of_prompt, endpoint.prompt)]


def _beginning(body: dict[str, Any], endpoint: Endpoint) -> str:
    """Text that is equal as far as the prompts of two requests are: a later turn of a chat begins as the one before."""
    if isinstance(body[endpoint.prompt], str) and not endpoint.more_of_prompt:
        return str(body[endpoint.prompt])
    # Without the closing brackets, which stand elsewhere in a longer chat.
    return json.dumps(_prompt_fields(body, endpoint))[:-2]


def _prompt_tokens(body: dict[str, Any], endpoint: Endpoint, counter: TokenCounter) -> list[int] | None:
    """Tokens of every prompt; None if they cannot be counted here."""
    if endpoint is CHAT:
        _check_messages(body["messages"])
    if not endpoint.is_counted:
        return None
    try:
        return [counter.chat(body)] if endpoint is CHAT else _count_prompts(body["prompt"], counter)
    except _Wrong:
        raise
    except Exception:
        # The template refused these messages, or they hold more than text, or text that is not Unicode: vLLM
        # will say or know better.
        return None


def _estimate(body: dict[str, Any], raw: bytes, endpoint: Endpoint, counter: TokenCounter) -> int:
    """Tokens of the JSON that holds the prompt, which are seldom fewer than its own."""
    try:
        return counter.text(json.dumps(_prompt_fields(body, endpoint), ensure_ascii=False))
    except Exception:  # text that is not Unicode; a token is at least one byte
        return len(raw)


def _count_prompts(prompt: Any, counter: TokenCounter) -> list[int]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, list) and prompts:
        if all(isinstance(token, int) for token in prompts):
            return [len(prompts)]
        if all(isinstance(text, str) for text in prompts):
            return [counter.text(text) for text in prompts]
        if all(isinstance(tokens, list) for tokens in prompts):
            return [len(tokens) for tokens in prompts]
    raise _Wrong("prompt is not a prompt: a completion needs a string, or a list of strings or token ids.", "prompt")


def _truncated(tokens: int, body: dict[str, Any], served: Served) -> int:
    keep = body.get("truncate_prompt_tokens")
    if keep == -1:  # what the model takes, and a token of output
        keep = served.max_model_len - 1
    return min(tokens, keep) if isinstance(keep, int) and keep > 0 else tokens


def _check_length(prompt: int, asked: int | None, limit_name: str, limit: _Limit, about: str = "") -> None:
    """As vLLM: where the prompt leaves less room than is asked for, the output ends there, and only more than the whole
    context is a mistake. Where the prompt is only estimated, nobody could tell where it has to end."""
    room = limit.tokens - prompt
    if room < 1:
        raise _Wrong(
            f"The prompt has {about}{prompt} tokens, but {limit.name} is {limit.tokens} and at least one token of "
            "output must fit: shorten the prompt."
        )
    if asked is not None and asked > (room if about else limit.tokens):
        raise _Wrong(
            f"{limit_name} is {asked}, but the prompt has {about}{prompt} tokens and {limit.name} is "
            f"{limit.tokens}: lower {limit_name} to at most {room}.",
            limit_name,
        )
