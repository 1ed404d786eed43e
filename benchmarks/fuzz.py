"""Hostile requests to a running fleet: `trifleet bench fuzz`.

Bodies are schemathesis' own, made from the endpoint's OpenAPI document: some that fit its schema and some that do not.
Half of them go as they are; of the others a few fields are laid over a small valid request, because whole ones mostly
fail at the first check. Every eighth request is bytes that are no JSON at all, or JSON that is hard on a parser. Some
clients leave before the answer. The same seed makes the same requests as long as the code is the same: Hypothesis draws
numbers and words from that.
"""

import asyncio
import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import schemathesis
from schemathesis import GenerationMode

from benchmarks.chaos import settled
from benchmarks.machine import machine
from deploy.fleet import running_fleet
from deploy.keys import key_header
from deploy.settings import load_settings

CLIENTS = 6
HUNG_SECONDS = 120.0
LEAVES_SECONDS = 0.05
MEANT = frozenset({501, 503})
"""Not implemented, and a full or starting fleet, which says when to come back."""
ROUTER_FAILED = "x-serve-reason"
EXAMPLES_KEPT = 20

_CHAT = [{"role": "user", "content": "hi"}]
_VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _CHAT, "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": _CHAT, "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": _CHAT},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""What a client may POST to (`replicas.access`)."""
_OUTPUT_LIMITS = frozenset({"max_tokens", "max_output_tokens"})


def bench_fuzz(settings_file: Path, cases: int, seed: int) -> dict[str, Any]:
    """The figures of the command."""
    settings = load_settings(settings_file)
    with running_fleet(settings) as url:
        return machine("vllm", "ray") | asyncio.run(attack(url, cases, seed))


async def attack(url: str, cases: int, seed: int) -> dict[str, Any]:
    """Send so many hostile requests to a fleet that runs, and wait until it is idle again."""
    statuses: Counter[str] = Counter()
    examples: list[dict[str, str]] = []
    async with httpx.AsyncClient(base_url=url, timeout=HUNG_SECONDS, headers=key_header()) as http:
        document = (await http.get("/openapi.json")).json()
        requests = iter(await asyncio.to_thread(_cases, document, cases, seed))

        async def client() -> None:
            for path, body, leaves in requests:
                status, text = await _send(http, path, body, leaves)
                statuses[status] += 1
                if _is_unexpected(status) and len(examples) < EXAMPLES_KEPT:
                    examples.append({"path": path, "status": status, "body": repr(body[:300]), "answer": text[:300]})

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    held, reserved = await settled(url)
    return {
        "cases": cases,
        "seed": seed,
        "statuses": dict(sorted(statuses.items())),
        "unexpected_5xx": sum(count for status, count in statuses.items() if _is_unexpected(status)),
        "hung": statuses["hung"],
        "examples": examples,
        "leaked_blocks": held,
        "leaked_reservations": reserved,
    }


def _is_unexpected(status: str) -> bool:
    return status in ("broken", "router failed") or (status.startswith("5") and int(status) not in MEANT)


async def _send(http: httpx.AsyncClient, path: str, body: bytes, leaves: bool) -> tuple[str, str]:
    """(status, the answer's text); a client that leaves has neither."""
    request = http.post(path, content=body, headers={"content-type": "application/json"})
    try:
        if leaves:
            async with asyncio.timeout(LEAVES_SECONDS):
                await request
            return "left", ""
        answer = await request
        # HAProxy's words for a router that answered with an error: not the 503 that is meant.
        return "router failed" if ROUTER_FAILED in answer.headers else str(answer.status_code), answer.text
    except TimeoutError:
        return "left", ""
    except httpx.ReadTimeout:
        return "hung", ""
    except httpx.HTTPError as error:
        # A stream that fails in the middle breaks off on purpose; what breaks before is not meant.
        return "broken", repr(error)


def _cases(document: dict[str, Any], count: int, seed: int) -> list[tuple[str, bytes, bool]]:
    """Path, body, and whether the client leaves."""
    schema = schemathesis.openapi.from_dict(document)
    kinds = [(path, mode) for path in _VALID for mode in GenerationMode]
    made = random.Random(seed)
    cases = []
    for number, (path, mode) in enumerate(kinds):
        share = count // len(kinds) + (number < count % len(kinds))
        bodies = _bodies(schema[path]["POST"].as_strategy(generation_mode=mode), share, seed)
        cases += [(path, _encoded(made, path, body), made.random() < 0.05) for body in bodies]
    made.shuffle(cases)
    return cases


def _bodies(
    strategy: "hypothesis.strategies.SearchStrategy[schemathesis.Case[Any]]", count: int, seed: int
) -> list[Any]:
    bodies: list[Any] = []
    while len(bodies) < count:
        # It may make fewer than asked for, where it runs out of new ones.
        @hypothesis.seed(seed + len(bodies))
        @hypothesis.settings(
            max_examples=count - len(bodies),
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
            deadline=None,
            database=None,
        )
        @hypothesis.given(strategy)
        def collect(case: schemathesis.Case[Any]) -> None:
            bodies.append(case.body)

        collect()
    return bodies[:count]


def _encoded(made: random.Random, path: str, body: Any) -> bytes:
    if made.random() < 0.125:
        return _no_json(made)
    if isinstance(body, bytes):
        return body
    if not isinstance(body, dict | list | str | int | float | None):
        return b""  # schemathesis' word for no body
    if isinstance(body, dict):
        if made.random() < 0.5:
            chosen = made.sample(sorted(body), min(len(body), made.randint(1, 4)))
            body = _VALID[path] | {name: body[name] for name in chosen}
        # Without a limit of its own an answer would be as long as the model allows.
        limits = {name: value for name, value in _VALID[path].items() if name in _OUTPUT_LIMITS}
        body = body | {name: value for name, value in limits.items() if body.get(name) is None}
    # Lone surrogates and what JSON has no word for go out as Python writes them.
    return json.dumps(body).encode()


def _no_json(made: random.Random) -> bytes:
    return made.choice(
        (
            b"",
            b"\x00" * 10,
            b"\xff\xfe" + b'{"prompt": "a"}',
            b'{"prompt": "\xc3\x28", "max_tokens": 1}',
            b"[" * made.choice((100, 10_000, 500_000)),
            b'{"prompt":' * 5000,
            b'{"prompt": "a", "max_tokens": 1' + b"0" * made.choice((400, 5000)) + b"}",
            b'{"prompt": "a", "prompt": "b", "max_tokens": 1}',
            b'{"messages": ['
            + b'{"role":"user","content":"a"},' * 3000
            + b'{"role":"user","content":"a"}], "max_tokens": 1}',
            struct.pack("<16d", *(made.random() for _ in range(16))),
            b'{"prompt": "' + b"a" * 1_100_000 + b'"}',
            b'"prompt"',
        )
    )
