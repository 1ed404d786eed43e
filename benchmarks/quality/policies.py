"""What a policy is called on the command line: `triattention`, or `triattention:selection=per_head,segments=8`."""

from pathlib import Path

from pydantic import ValidationError

from benchmarks.quality.report import FULL
from triattention.config import CompressionConfig
from triattention.policies import policy_names


class PolicyError(ValueError):
    """A policy cannot be run; the message is one sentence."""


def compression(
    spec: str, budget: int | None, interval: int, window: int, statistics: Path | None
) -> CompressionConfig | None:
    """The settings of `spec` at a budget; None for `full`. Settings that the spec names win.

    Raises PolicyError for an unknown policy or setting, and for settings that do not go together.
    """
    name, _, rest = spec.partition(":")
    if name == FULL:
        return None
    if name not in policy_names():
        raise PolicyError(f'policy is "{name}", which is not registered: use one of {", ".join(policy_names())}')
    settings: dict[str, object] = {"policy": name, "budget": budget, "interval": interval, "window": window}
    if name == "triattention":
        settings["statistics"] = statistics
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise PolicyError(f'policy is "{spec}", where "{part}" sets nothing: write setting=value')
        settings[key] = value
    try:
        return CompressionConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise PolicyError(
            f'policy is "{spec}" at budget {budget}: {place + ": " if place else ""}{first["msg"]}'
        ) from None
