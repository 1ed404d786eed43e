"""The key with which `trifleet status`, `demo` and the benchmarks ask a fleet that takes keys."""

import os

from deploy.settings import SettingsError

KEY_VARIABLE = "TRIFLEET_KEY"


def client_key() -> str | None:
    """None where there is none, or an empty one. Raises `SettingsError`, which does not repeat it, for one that does
    not travel in a header as it is."""
    key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and not all("!" <= character <= "~" for character in key):
        raise SettingsError(
            f"{KEY_VARIABLE} holds white space or characters beyond ASCII: set it to a key as `trifleet keys new` "
            "prints it, without what stands around it"
        )
    return key


def key_header() -> dict[str, str]:
    key = client_key()
    return {"authorization": f"Bearer {key}"} if key else {}
