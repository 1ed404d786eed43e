"""Tiers: what an API key entitles to. Owns the settings of a tier and the way from a key to its tier.

Keys never stand in the settings: a key is named by its SHA-256 or by the environment variable that holds it, and
only hashes leave the process that reads the settings. What a tier's values do is decided elsewhere: the largest
context in `requests.py`, order and share of the queue in `admission.py` and `fairness.py`.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from replicas.access import ADMIN, DEFAULT_TIER, Keyring, KeysFileError, Tenant, tenant_of
from replicas.turnstile import Allowance

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VARIABLE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


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

    concurrent_requests: int | None = Field(
        default=None, ge=1, description="of one key, running and waiting; null: no limit"
    )
    requests_per_minute: int | None = Field(default=None, ge=1, description="of one key; null: no limit")

    @field_validator("keys")
    @classmethod
    def _keys_are_no_secrets(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return check_keys(keys)

    @property
    def allowance(self) -> Allowance:
        return Allowance(self.concurrent_requests, self.requests_per_minute)


def check_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError for an entry that names no key."""
    for number, key in enumerate(keys):
        if not _DIGEST.fullmatch(key) and not _VARIABLE.fullmatch(key):
            # The value is not repeated: it may be the key itself.
            raise ValueError(
                f"entry {number} is neither sha256: with 64 hexadecimal digits nor env: with a variable's name; "
                "`trifleet keys new` makes a key and its hash"
            )
    return keys


class TierKeyError(ValueError):
    """A key of the settings cannot be used; the message is a sentence."""


def with_default(tiers: Mapping[str, Tier]) -> dict[str, Tier]:
    """The tiers of the settings and the one that is always there."""
    return {DEFAULT_TIER: Tier(), **tiers}


def check_names(tiers: Iterable[str]) -> None:
    """Tiers are labels of metrics and travel in a header. Raises ValueError."""
    for name in tiers:
        if name == ADMIN:
            raise ValueError(f'"{ADMIN}" is not a tier: its keys are access.admin_keys')
        if not _NAME.fullmatch(name):
            raise ValueError(
                f'"{name}" is not a tier\'s name: use up to 32 lower-case letters, digits, - and _, a letter first'
            )


def keyring(
    tiers: Mapping[str, Tier],
    environment: Mapping[str, str] = os.environ,
    admin_keys: tuple[str, ...] = (),
    file: Path | None = None,
) -> Keyring:
    """Resolve every key of the settings to its hash. Raises `TierKeyError`."""
    digests: dict[bytes, Tenant] = {}
    named = [(f"tiers.{name}.keys", name, key) for name, tier in tiers.items() for key in tier.keys]
    named += [("access.admin_keys", ADMIN, key) for key in admin_keys]
    for setting, tier, key in named:
        digest = _digest(key, setting, environment)
        if digest in digests:
            other = ADMIN if digests[digest].is_admin else digests[digest].tier
            raise TierKeyError(f"{setting} names a key that tier {other} has as well: remove one of them")
        digests[digest] = tenant_of(digest, tier)
    try:
        return Keyring(digests, file, frozenset(tiers))
    except KeysFileError as error:
        raise TierKeyError(f"access.keys_file: {error}") from None


def _digest(key: str, setting: str, environment: Mapping[str, str]) -> bytes:
    kind, _, value = key.partition(":")
    if kind == "sha256":
        return bytes.fromhex(value)
    secret = environment.get(value)
    if not secret:
        raise TierKeyError(f"{setting} names the environment variable {value}, which is not set: set it")
    return hashlib.sha256(os.fsencode(secret)).digest()
