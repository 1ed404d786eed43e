"""Who may ask for what: API keys, and what each path of a replica takes to be answered.

A replica is the fleet's HTTP server, so what is decided here holds whichever way a request came; the router decides
the same earlier, so that a refused request books nothing. Keys are known by their SHA-256 only.
"""

import base64
import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from replicas.endpoints import FREE, GENERATING
from replicas.headers import Answer

logger = logging.getLogger("ray.serve")

DEFAULT_TIER = "default"
ADMIN = "admin"
"""In a keys file, where a tier stands for others: a key for the pages and everything else that is not a client's."""
ANONYMOUS = "anonymous"
"""The tenant of all requests without a known key: they share one share."""

_TENANT_DIGITS = 16
_LINE = re.compile(r"sha256:([0-9a-f]{64})\s+(\S+)")

# For probes, which have no key. They say that the process answers and nothing else.
_OPEN = frozenset({"/health", "/ping", "/-/healthz"})
_CLIENTS = frozenset({*GENERATING, *FREE, "/v1/models", "/version"})


class KeysFileError(ValueError):
    """A keys file cannot be used; the message is a sentence that repeats nothing of the file."""


@dataclass(frozen=True)
class Tenant:
    """Who a request is from. `name` is safe to log: the beginning of the key's hash."""

    name: str
    tier: str
    is_admin: bool = False

    @property
    def is_known(self) -> bool:
        return self.name != ANONYMOUS


_NOBODY = Tenant(ANONYMOUS, DEFAULT_TIER)


def tenant_of(digest: bytes, tier: str) -> Tenant:
    """`tier` may be ADMIN."""
    name = digest.hex()[:_TENANT_DIGITS]
    return Tenant(name, DEFAULT_TIER, is_admin=True) if tier == ADMIN else Tenant(name, tier)


class Keyring:
    """Hashes of all API keys, and whose they are. A keys file is read again whenever it changes."""

    def __init__(
        self, digests: Mapping[bytes, Tenant], file: Path | None = None, tiers: frozenset[str] = frozenset()
    ) -> None:
        """`tiers`: those that `file` may name. Raises `KeysFileError` for a file with a mistake."""
        self._fixed = tuple(digests.items())
        self._file = file
        self._tiers = tiers
        self._of_file: tuple[tuple[bytes, Tenant], ...] = ()
        self._seen: tuple[int, int, int] | None = None
        """The version of the file that was read last."""
        self._trouble = ""
        """Why it cannot be read now: said already."""
        if file is not None:
            self._seen = _version(file)
            keys, mistakes = read_keys(file, tiers)
            if mistakes:
                raise KeysFileError(" ".join(mistakes))
            self._of_file = tuple(keys.items())

    def tenant(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header, Bearer or Basic (the password); an unknown key is as good as none.

        `authorization`: read as Latin-1, as ASGI's headers are; a key is the bytes that were sent.
        Compares with every hash, each in constant time: how long it takes tells nothing of the keys.
        """
        self._reread()
        key = _key(authorization or "")
        digest = hashlib.sha256(key or b"").digest()
        found = _NOBODY
        for known, tenant in (*self._fixed, *self._of_file):
            if hmac.compare_digest(known, digest) and key is not None:
                found = tenant
        return found

    def _reread(self) -> None:
        """What is wrong with a version of the file is said once. A line with a mistake does not count and the others
        do, so that a slip delays no revocation; a file that cannot be read leaves the keys as they were, until it can
        be."""
        if self._file is None or (seen := _version(self._file)) == self._seen:
            return
        try:
            keys, mistakes = read_keys(self._file, self._tiers)
        except KeysFileError as error:
            if str(error) != self._trouble:
                logger.error("%s The keys stay as they were.", error)
            self._trouble = str(error)
            return
        # Only now: a version of which one read failed would otherwise never count.
        self._seen, self._trouble = seen, ""
        self._of_file = tuple(keys.items())
        for mistake in mistakes:
            logger.error("%s This line does not count.", mistake)
        logger.info("%s holds %d keys now.", self._file, len(keys))


def _version(file: Path) -> tuple[int, int, int] | None:
    """What is another after every change, of the file's mode too; None of a file that is not there."""
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_ctime_ns, state.st_size, state.st_ino


def read_keys(file: Path, tiers: frozenset[str]) -> tuple[dict[bytes, Tenant], list[str]]:
    """Lines of `sha256:HEX TIER`, or `admin` for the tier; # begins a comment. And a sentence for each other line.

    Raises `KeysFileError` for a file that cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise KeysFileError(f"The keys file {file} cannot be read: {error.strerror}.") from None
    keys: dict[bytes, Tenant] = {}
    mistakes: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        found = _LINE.fullmatch(words)
        if found is None:
            # The line is not repeated: it may hold a key.
            mistakes.append(
                f"Line {number} of {file} is not `sha256:HEX TIER`: `trifleet keys new` writes such a line."
            )
            continue
        digest, tier = bytes.fromhex(found.group(1)), found.group(2)
        if tier not in tiers | {ADMIN, DEFAULT_TIER}:
            known = ", ".join(sorted(tiers | {ADMIN, DEFAULT_TIER}))
            mistakes.append(f"Line {number} of {file} names tier {tier[:50]}, which is none: known are {known}.")
        elif digest in keys:
            mistakes.append(f"Line {number} of {file} repeats a key: remove one of the two lines.")
        else:
            keys[digest] = tenant_of(digest, tier)
    return keys, mistakes


def _key(authorization: str) -> bytes | None:
    scheme, _, value = authorization.encode("latin-1").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":  # what a browser sends, and Prometheus' basic_auth
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:  # not Base64
            return None
    return None


@dataclass(frozen=True)
class Access:
    keyring: Keyring
    is_required: bool
    """Whether a request needs a key at all. Where not, an unknown key is of the tier "default"."""

    def refusal(self, path: str, tenant: Tenant) -> Answer | None:
        """What a request of `tenant` for `path` is answered instead, if anything."""
        if not self.is_required or path in _OPEN or tenant.is_admin:
            return None
        if not tenant.is_known:
            return Answer(
                401, "AuthenticationError", "The API key is missing or unknown: send Authorization: Bearer KEY."
            )
        if path not in _CLIENTS:
            return Answer(403, "PermissionDeniedError", "This path is for an admin key: see access.admin_keys.")
        return None
