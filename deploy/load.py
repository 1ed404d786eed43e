"""A mixed load of short chats and long reasoning against an OpenAI-compatible endpoint.

Owns what is asked and what came of each request. Knows nothing of the fleet behind the endpoint: `demo.py`
reads its metrics.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import openai

import bundled
from deploy.keys import client_key

SHORTEST_LONG_OUTPUT = 1500
SHORT_OUTPUT_LIMIT = 120
# Long outputs differ in length, as real ones do: they neither start nor end in step.
LONG_OUTPUTS = (1600, 1800, 2040, 2400)
# What a trace may take beyond its plan before it is cut off.
LONG_OUTPUT_MARGIN = 120
REQUEST_TIMEOUT_SECONDS = 1200.0


@dataclass(frozen=True)
class LoadRequest:
    """One chat request. Sizes in tokens."""

    prompt: str
    max_tokens: int
    min_tokens: int = 0

    @property
    def is_long(self) -> bool:
        return self.min_tokens > 0


@dataclass(frozen=True)
class Outcome:
    """What came of one request."""

    request: LoadRequest
    output_tokens: int
    first_token_seconds: float | None
    """From sending to the first piece of text; None if none came."""
    error: str | None = None
    """One sentence, or None if all went well."""


def mixed_load(count: int, seed: int = 0) -> list[LoadRequest]:
    """`count` requests for the bundled model, every third one a short chat, the same for the same seed."""
    load = []
    for number in range(count):
        if number % 3 == 2:
            load.append(LoadRequest(bundled.short_prompt(seed + number), SHORT_OUTPUT_LIMIT))
        else:
            tokens = LONG_OUTPUTS[number % len(LONG_OUTPUTS)]
            prompt = bundled.demo_prompt(seed + number, tokens)
            load.append(LoadRequest(prompt, tokens + LONG_OUTPUT_MARGIN, SHORTEST_LONG_OUTPUT))
    return load


async def run_load(
    endpoint: str,
    model: str,
    load: list[LoadRequest],
    concurrency: int,
    on_tokens: Callable[[int], None],
    on_done: Callable[[Outcome], None],
) -> list[Outcome]:
    """Send the load, at most `concurrency` requests at once; an outcome for each, in the order of `load`.

    `endpoint` is the server's root, such as http://127.0.0.1:8000. `on_tokens` is called with the number of
    new tokens while they stream in.
    """
    slots = asyncio.Semaphore(concurrency)
    # No retries: a refusal is a result here.
    async with openai.AsyncOpenAI(
        base_url=f"{endpoint}/v1",
        api_key=client_key() or "none",
        max_retries=0,
        timeout=REQUEST_TIMEOUT_SECONDS,
    ) as client:

        async def one(request: LoadRequest) -> Outcome:
            async with slots:
                outcome = await _send(client, model, request, on_tokens)
            on_done(outcome)
            return outcome

        return list(await asyncio.gather(*(one(request) for request in load)))


async def _send(
    client: openai.AsyncOpenAI, model: str, request: LoadRequest, on_tokens: Callable[[int], None]
) -> Outcome:
    started = time.monotonic()
    tokens, first_token_seconds, finish = 0, None, None
    error = None
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": request.prompt}],
            max_tokens=request.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            # vLLM's additions: the length is part of the load, and the count runs while the text streams in.
            extra_body={
                "min_tokens": request.min_tokens,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
        )
        async for chunk in stream:
            if chunk.usage is not None and chunk.usage.completion_tokens > tokens:
                on_tokens(chunk.usage.completion_tokens - tokens)
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if first_token_seconds is None and choice.delta.content:
                    first_token_seconds = time.monotonic() - started
                finish = choice.finish_reason or finish
        if finish is None:
            error = f"The stream ended after {tokens} tokens without a finish reason."
        elif tokens < request.min_tokens:
            error = f"The answer ended after {tokens} tokens, but min_tokens was {request.min_tokens}."
    except openai.APIStatusError as refusal:
        error = f"HTTP {refusal.status_code}: {_sentence(refusal)}"
    except Exception as failure:  # whatever breaks one request is that request's outcome, not the load's end
        error = f"The request failed after {tokens} tokens: {failure or type(failure).__name__}"
    return Outcome(request, tokens, first_token_seconds, error)


def _sentence(refusal: openai.APIStatusError) -> str:
    """The server's own sentence, out of OpenAI's error body where there is one."""
    body = refusal.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    return refusal.message
