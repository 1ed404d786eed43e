"""The requests of `trifleet bench fuzz`: as many as asked for, the same for the same seed, of every kind."""

import json
from typing import Any

from benchmarks.fuzz import _VALID, _cases

_BODY = {"type": "object", "properties": {"n": {"type": "integer"}, "stop": {"type": "string"}}, "required": ["n"]}
_POST = {
    "requestBody": {"content": {"application/json": {"schema": _BODY}}, "required": True},
    "responses": {"200": {"description": "fine"}},
}
DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "any", "version": "1"},
    "paths": {path: {"post": _POST} for path in _VALID},
}


def test_a_seed_makes_the_same_requests_of_every_kind() -> None:
    cases = _cases(DOCUMENT, 150, seed=1)
    assert len(cases) == 150
    assert cases == _cases(DOCUMENT, 150, seed=1)
    assert {path for path, _, _ in cases} == set(_VALID)
    kinds = set()
    for path, body, _ in cases:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            kinds.add("no JSON")
            continue
        if isinstance(value, dict):
            valid = _VALID[path]
            kinds.add("laid over a valid one" if valid.keys() - {"max_tokens"} <= value.keys() else "as made")
    assert kinds == {"no JSON", "laid over a valid one", "as made"}
