"""The paths of vLLM's application that a fleet serves, and how a request to each says what it will take.

The router knows a request by them before any replica does, and the replica checks that both read the same path. What
vLLM has beyond these (`/invocations`, `/inference/v1/generate`, scaling, ...) would generate unbooked, or act on
whichever replica it meets, so it is not served.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """One that generates, so that it is booked."""

    kind: str
    prompt: str
    """The field that holds it."""
    prompt_missing: str
    output_limits: tuple[str, ...]
    """Fields that bound the output in tokens; the first that is there counts."""
    more_of_prompt: tuple[str, ...] = ()
    """Fields that the prompt holds as well, before it."""
    default_output: int | None = None
    """Tokens, where the request names no limit; None: up to the model's length."""
    is_counted: bool = False
    """The router counts its prompt exactly; others are estimated."""
    id_in_body: tuple[str, str] | None = None
    """The field from which vLLM takes the request's id, if not from X-Request-Id, and how that begins."""


CHAT = Endpoint(
    kind="chat",
    prompt="messages",
    prompt_missing="messages is missing: a chat completion needs a list of at least one message.",
    output_limits=("max_completion_tokens", "max_tokens"),
    more_of_prompt=("tools",),
    is_counted=True,
)
COMPLETION = Endpoint(
    kind="completion",
    prompt="prompt",
    prompt_missing="prompt is missing: a completion needs a string, or a list of strings or token ids.",
    output_limits=("max_tokens",),
    default_output=16,
    is_counted=True,
)
RESPONSE = Endpoint(
    kind="response",
    prompt="input",
    prompt_missing="input is missing: a response needs a string or a list of items.",
    output_limits=("max_output_tokens",),
    more_of_prompt=("tools", "instructions"),
    id_in_body=("request_id", "resp_"),
)
MESSAGE = Endpoint(
    kind="message",
    prompt="messages",
    prompt_missing="messages is missing: send a list of at least one message.",
    output_limits=("max_tokens",),
    more_of_prompt=("tools", "system"),
)

GENERATING = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/v1/messages": MESSAGE,
}

NOTHING_BOOKED = "nothing"
"""The kind of every other request."""

FREE = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        *(f"{path}/render" for path in GENERATING),
    }
)
"""POSTs that generate nothing: any replica answers them, at once."""


def kind_of(path: str) -> str:
    endpoint = GENERATING.get(path)
    return NOTHING_BOOKED if endpoint is None else endpoint.kind
