"""Headers that the fleet's router puts on a request for the replica, and what they mean.

All begin with the prefix that Ray Serve's HAProxy removes from every request of a client
(`SERVE_INGRESS_ROUTER_HEADER_PREFIX`), so a replica may trust them. HAProxy copies their values from the
router's answer with a simple pattern: no quotes, no braces, hence base64 for text.
"""

import base64
import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

PREFIX = "x-serve-router-"
RESERVATION = PREFIX + "reservation"
REFUSAL = PREFIX + "refusal"
KIND = PREFIX + "kind"
"""`endpoints.kind_of` the path that the router has read."""
TIER = PREFIX + "tier"
LENGTH_CLASS = PREFIX + "class"
"""short or long, as the coordinator has it: a label of metrics."""
WAITED = PREFIX + "waited"
"""Seconds since the request reached the router."""
OUTPUT_LIMIT = PREFIX + "output-limit"
"""Tokens of output at most, for a request that names no limit itself and whose tier has one."""

_RESERVATION_ID = re.compile(r"rsv[0-9a-f]{32}")


def new_reservation() -> str:
    return f"rsv{uuid.uuid4().hex}"


def reservation_of(engine_request: str) -> str | None:
    """The reservation inside one of vLLM's internal request ids.

    The replica hands the reservation to vLLM as X-Request-Id, and vLLM builds on it: `chatcmpl-<id>-<random>`,
    `cmpl-<id>-<prompt>-<random>`, with `<child>_` in front when n > 1. None for a request without reservation.
    """
    found = _RESERVATION_ID.search(engine_request)
    return found.group() if found else None


@dataclass(frozen=True)
class Answer:
    """A refusal that a replica answers instead of the engine."""

    status: int
    kind: str
    """OpenAI's error `type`, for example invalid_request_error."""
    message: str
    param: str | None = None
    retry_after_seconds: int | None = None

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}

    def encode(self) -> str:
        values = [self.status, self.kind, self.message, self.param, self.retry_after_seconds]
        return base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode()

    @classmethod
    def decode(cls, value: str) -> "Answer":
        return cls(*json.loads(base64.urlsafe_b64decode(value)))
