"""Tiers: what an API key entitles to. Owns the settings of a tier and the way from a key to its tier.

Keys never stand in the settings: a key is named by its SHA-256 or by the environment variable that holds it, and
only hashes leave the process that reads the settings. What a tier's values do is decided elsewhere: the largest
context in `requests.py`, order and share of the queue in `admission.py` and `fairness.py`.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

DEFAULT_TIER = "default"
# The tenant of all requests without a key of the settings: they share one share.
ANONYMOUS = "anonymous"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VARIABLE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_TENANT_DIGITS = 16


class Tier(BaseModel):
    """One tier. Every key of it is a tenant of its own; requests without a known key are of the tier "default"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[str, ...] = Field(
        default=(), description="API keys: sha256:HEX, the key's hash, or env:NAME, the variable that holds the key"
    )
    max_context_tokens: int | None = Field(
        default=None, ge=1, description="tokens, prompt and output; null: the model's own limit"
    )
    priority: int = Field(default=0, ge=-100, le=100, description="lower is served earlier, by aging_seconds a step")
    share: float = Field(default=1.0, gt=0, description="weight of each key's block-seconds when requests queue")
    first_token_target_seconds: float | None = Field(
        default=None, gt=0, description="queued requests are due after so long; null: after aging_seconds"
    )

    @field_validator("keys")
    @classmethod
    def _keys_are_no_secrets(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for number, key in enumerate(keys):
            if not _DIGEST.fullmatch(key) and not _VARIABLE.fullmatch(key):
                # The value is not repeated: it may be the key itself.
                raise ValueError(
                    f"entry {number} is neither sha256: with 64 hexadecimal digits nor env: with a variable's name; "
                    "`printf %s KEY | sha256sum` makes the hash of a key"
                )
        return keys


class TierKeyError(ValueError):
    """A key of the settings cannot be used; the message is a sentence."""


@dataclass(frozen=True)
class Tenant:
    """Who a request is from. `name` is safe to log: the beginning of the key's hash."""

    name: str
    tier: str


class Keyring:
    """Hashes of all API keys, and whose they are."""

    def __init__(self, digests: Mapping[bytes, Tenant]) -> None:
        self._digests = tuple(digests.items())

    def tenant(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header; an unknown key is as good as none.

        Compares with every hash, each in constant time: how long it takes tells nothing of the keys.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = Tenant(ANONYMOUS, DEFAULT_TIER)
        for known, tenant in self._digests:
            if hmac.compare_digest(known, digest) and scheme.lower() == "bearer":
                found = tenant
        return found


def with_default(tiers: Mapping[str, Tier]) -> dict[str, Tier]:
    """The tiers of the settings and the one that is always there."""
    return {DEFAULT_TIER: Tier(), **tiers}


def check_names(tiers: Mapping[str, Tier]) -> None:
    """Tiers are labels of metrics and travel in a header. Raises ValueError."""
    for name in tiers:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f'"{name}" is not a tier\'s name: use up to 32 lower-case letters, digits, - and _, a letter first'
            )


def keyring(tiers: Mapping[str, Tier], environment: Mapping[str, str] = os.environ) -> Keyring:
    """Resolve every key of the settings to its hash. Raises `TierKeyError`."""
    digests: dict[bytes, Tenant] = {}
    for name, tier in tiers.items():
        for key in tier.keys:
            digest = _digest(key, name, environment)
            if digest in digests:
                raise TierKeyError(
                    f"tiers.{name}.keys names a key that tier {digests[digest].tier} has as well: remove one of them"
                )
            digests[digest] = Tenant(digest.hex()[:_TENANT_DIGITS], name)
    return Keyring(digests)


def _digest(key: str, tier: str, environment: Mapping[str, str]) -> bytes:
    kind, _, value = key.partition(":")
    if kind == "sha256":
        return bytes.fromhex(value)
    secret = environment.get(value)
    if not secret:
        raise TierKeyError(f"tiers.{tier}.keys names the environment variable {value}, which is not set: set it")
    return hashlib.sha256(secret.encode()).digest()
