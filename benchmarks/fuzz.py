"""Hostile requests to a running fleet: `trifleet bench fuzz`.

Bodies are made from the schemas of the endpoint's own OpenAPI document: mostly valid ones with a few fields replaced by
something of their type at its edge, of another type, or by rubbish; every eighth is bytes that are no JSON at all, or
JSON that is hard on a parser. Some clients leave before the answer. The same seed makes the same requests.
"""

import asyncio
import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos import settled
from benchmarks.machine import machine
from deploy.fleet import running_fleet
from deploy.settings import load_settings

CLIENTS = 6
HUNG_SECONDS = 120.0
LEAVES_SECONDS = 0.05
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
MEANT = frozenset({501, 503})
"""Not implemented, and a full or starting fleet, which says when to come back."""
EXAMPLES_KEPT = 20

_NUMBERS = (0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-308)
_TEXTS = (
    "",
    "a",
    "\x00",
    "\ud800",
    "\u202e",
    "é" * 50,
    "a" * 5000,
    "{{ 7 * 7 }}",
    "<|im_end|>",
    "../../etc/passwd",
    "null",
)
_VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2, 3]},
}


def bench_fuzz(settings_file: Path, cases: int, seed: int) -> dict[str, Any]:
    """The figures of the command."""
    settings = load_settings(settings_file)
    with running_fleet(settings) as url:
        return machine("vllm", "ray") | asyncio.run(attack(url, cases, seed))


async def attack(url: str, cases: int, seed: int) -> dict[str, Any]:
    """Send so many hostile requests to a fleet that runs, and wait until it is idle again."""
    made = random.Random(seed)
    statuses: Counter[str] = Counter()
    examples: list[dict[str, str]] = []
    async with httpx.AsyncClient(base_url=url, timeout=HUNG_SECONDS) as http:
        fields = _fields((await http.get("/openapi.json")).json())
        requests = iter([_case(made, fields) for _ in range(cases)])

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
        "fields": {path: len(names) for path, names in fields.items()},
        "statuses": dict(sorted(statuses.items())),
        "unexpected_5xx": sum(count for status, count in statuses.items() if _is_unexpected(status)),
        "hung": statuses["hung"],
        "examples": examples,
        "leaked_blocks": held,
        "leaked_reservations": reserved,
    }


def _is_unexpected(status: str) -> bool:
    return status == "broken" or (status.startswith("5") and int(status) not in MEANT)


async def _send(http: httpx.AsyncClient, path: str, body: bytes, leaves: bool) -> tuple[str, str]:
    """(status, the answer's text); a client that leaves has neither."""
    request = http.post(path, content=body, headers={"content-type": "application/json"})
    try:
        if leaves:
            await asyncio.wait_for(request, LEAVES_SECONDS)
            return "left", ""
        answer = await request
        return str(answer.status_code), answer.text
    except TimeoutError:
        return "left", ""
    except httpx.ReadTimeout:
        return "hung", ""
    except httpx.HTTPError as error:
        # A stream that fails in the middle breaks off on purpose; what breaks before is not meant.
        return "broken", repr(error)


def _fields(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Path -> the properties of its body, out of an OpenAPI document."""
    found: dict[str, dict[str, Any]] = {}
    for path in PATHS:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        properties: dict[str, Any] = {}
        for one in [schema, *schema.get("anyOf", ())]:
            name = one.get("$ref", "").rpartition("/")[2]
            properties |= (document["components"]["schemas"][name] if name else one).get("properties", {})
        found[path] = properties
    return found


def _case(made: random.Random, fields: dict[str, dict[str, Any]]) -> tuple[str, bytes, bool]:
    path = made.choice(PATHS)
    leaves = made.random() < 0.05
    if made.random() < 0.125:
        return path, _no_json(made), leaves
    body = dict(_VALID[path])
    names = sorted(fields[path])
    for name in made.sample(names, min(len(names), made.randint(1, 4))):
        body[name] = _value(made, fields[path][name])
    if made.random() < 0.1:
        body.pop(made.choice(sorted(body)))
    # Lone surrogates and what JSON has no word for go out as Python writes them.
    return path, json.dumps(body).encode(), leaves


def _value(made: random.Random, schema: dict[str, Any], depth: int = 0) -> Any:
    options = schema.get("anyOf") or [schema]
    chosen = made.choice(options)
    if made.random() < 0.4:
        return _rubbish(made, depth)
    if "enum" in chosen:
        return made.choice(chosen["enum"])
    kind = chosen.get("type")
    if kind in ("integer", "number"):
        return made.choice((*_NUMBERS, chosen.get("minimum", 0), chosen.get("maximum", 3)))
    if kind == "string":
        return made.choice(_TEXTS)
    if kind == "boolean":
        return made.random() < 0.5
    if kind == "array":
        return [_value(made, chosen.get("items", {}), depth + 1) for _ in range(made.randint(0, 3))]
    return _rubbish(made, depth)


def _rubbish(made: random.Random, depth: int) -> Any:
    kind = made.randrange(6 if depth < 3 else 4)
    if kind == 0:
        return made.choice(_NUMBERS)
    if kind == 1:
        return made.choice(_TEXTS)
    if kind == 2:
        return made.choice((None, True, False, float("nan"), float("inf")))
    if kind == 3:
        return made.choice(([], {}, [[]], [None], {"": ""}))
    if kind == 4:
        return [_rubbish(made, depth + 1) for _ in range(made.randint(1, 4))]
    return {
        made.choice((*_TEXTS, "type", "role", "content")): _rubbish(made, depth + 1) for _ in range(made.randint(1, 3))
    }


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
