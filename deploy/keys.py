"""The key with which `trifleet status`, `demo` and the benchmarks ask a fleet that takes keys."""

import os

KEY_VARIABLE = "TRIFLEET_KEY"


def key_header() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE)
    return {"authorization": f"Bearer {key}"} if key else {}
