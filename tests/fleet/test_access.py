"""Keys and limits through the real fleet: HAProxy, the router, the replicas and their logs.

This fleet has a key of one tier and lets in requests without one; where a key is needed is `tests/unit/test_door.py`'s.
"""

import concurrent.futures
from pathlib import Path

import httpx
import pytest

from tests.fleet.conftest import GOLD_KEY, MODEL, OTHER_SITE, RunningFleet

UNUSUAL = "perispomenon-zugzwang"


def complete(fleet: RunningFleet, key: str | None = None, **fields: object) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": MODEL, "prompt": "go", "max_tokens": 2, **fields}
    return httpx.post(f"{fleet.url}/v1/completions", json=body, headers=headers, timeout=120)


@pytest.mark.parametrize(
    ("at", "over"),
    [({"n": 2, "temperature": 1}, {"n": 17}),
     ({"stop": ["qq"] * 4}, {"stop": ["qq"] * 5}), ({"logprobs": 20}, {"logprobs": 21}),
     ({"prompt": ["a"] * 8}, {"prompt": ["a"] * 65}), ({"n": 1}, {"n": 10**4000})],
)  # fmt: skip
def test_limits_hold_and_say_so(fleet: RunningFleet, at: dict[str, object], over: dict[str, object]) -> None:
    inside = complete(fleet, **at)
    assert inside.status_code == 200, inside.text
    refused = complete(fleet, **over)
    assert refused.status_code == 400
    assert "limits." in refused.json()["error"]["message"]
    assert refused.headers["x-request-id"]


def test_a_number_of_too_many_digits_is_refused_by_sentence(fleet: RunningFleet) -> None:
    body = b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}"
    answer = httpx.post(f"{fleet.url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert "too many digits" in answer.json()["error"]["message"]


def test_a_key_has_one_request_at_once_in_the_whole_fleet(fleet: RunningFleet) -> None:
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        fields = {"max_tokens": 300, "ignore_eos": True}
        answers = list(threads.map(lambda _: complete(fleet, GOLD_KEY, **fields), range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "concurrent_requests" in refused.json()["error"]["message"]
    assert complete(fleet, GOLD_KEY).status_code == 200


def test_a_page_of_a_site_that_is_allowed_may_ask_and_reads_refusals(fleet: RunningFleet) -> None:
    url = f"{fleet.url}/v1/completions"
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    for site, status in ((OTHER_SITE, 200), ("http://unknown.example", 400)):
        assert httpx.options(url, headers={"origin": site, **asks}).status_code == status
    for model, status in ((MODEL, 200), ("nobody", 404)):
        body = {"model": model, "prompt": "go", "max_tokens": 2}
        answer = httpx.post(url, json=body, headers={"origin": OTHER_SITE}, timeout=60)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, OTHER_SITE)


def test_no_log_of_the_fleet_holds_a_key_or_a_prompt(fleet: RunningFleet) -> None:
    assert complete(fleet, GOLD_KEY, prompt=UNUSUAL).status_code == 200
    assert complete(fleet, GOLD_KEY, prompt=UNUSUAL, n=99).status_code == 400
    logs = {Path(file.path) for process in fleet.family() for file in process.open_files() if "/logs/" in file.path}
    folders = {next(parent for parent in log.parents if parent.name == "logs") for log in logs}
    texts = {log: log.read_bytes() for folder in folders for log in folder.rglob("*") if log.is_file()}
    assert len(texts) > 10
    texts[fleet.log] = fleet.log.read_bytes()
    for secret in (GOLD_KEY, UNUSUAL):
        assert [log for log, text in texts.items() if secret.encode() in text] == []
