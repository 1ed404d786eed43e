"""What arrives, and on which fleet: scenarios and their request traces. Same seed, same trace, whoever routes it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triattention.config import CompressionConfig


@dataclass(frozen=True)
class Clock:
    """Seconds of an engine step: `step + sequence * sequences + prompt_token * prompt tokens computed in it`."""

    step: float
    sequence: float
    prompt_token: float


CARD = Clock(step=0.029, sequence=0.0007, prompt_token=0.00026)
"""An 8B model in bf16 on a 24 GB card of 600 GB/s and 125 TFLOP/s. Arithmetic, not a measurement: 16.4 GB of weights
take 27 ms to read, and 2 ms for the rest of a step; 2,400 tokens of KV, 0.35 GB, take 0.6 ms, and 0.1 ms for the rest;
a prompt token 16.4 GFLOP at half the peak."""


@dataclass(frozen=True)
class Pool:
    """One make of replica. Sizes in blocks and tokens, as `deploy.settings` names them."""

    share: float
    """Of the fleet's replicas."""
    total_blocks: int
    block_size: int
    compression: CompressionConfig
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int = 32_768


def _budget(tokens: int) -> CompressionConfig:
    return CompressionConfig.model_validate({"budget": tokens, "interval": 128, "window": 128, "policy": "random"})


POOLS = (
    Pool(0.6, total_blocks=1280, block_size=32, compression=_budget(2048)),
    Pool(0.3, total_blocks=2048, block_size=32, compression=_budget(2048)),
    Pool(0.1, total_blocks=1280, block_size=64, compression=_budget(3072)),
)
"""40 % of the fleet is not like the rest. 1,280 blocks of 32 tokens are what a 24 GB card has beside an 8B model in
bf16 (147,456 bytes of KV a token); about 16 long requests fit, as each may hold its prompt, budget and interval."""


@dataclass(frozen=True)
class Scenario:
    """How much arrives. `load` is the mean rate of tokens as a share of what the fleet makes when full."""

    name: str
    load: float
    burst_factor: float = 2.0
    """Arrivals in a burst come so many times as fast as outside."""
    burst_seconds: float = 120.0
    calm_seconds: float = 360.0
    """Mean lengths of bursts and of the time between them, exponentially distributed."""
    long_share: float = 0.1
    reserve_growth: bool = False
    """The engines' own admission: False is vLLM's, True is `CompressionConfig.reserve_growth`."""
    clock: Clock = CARD
    patience_seconds: float = 60.0
    """A client without a first token goes away after so long; the coordinator's queue deadline is the same."""
    first_token_seconds_short: float = 2.0
    first_token_seconds_long: float = 10.0
    token_seconds: float = 0.08
    """Targets: an answer that keeps them counts as goodput. 80 ms a token is about twice as fast as people read."""


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("busy", load=0.95),
        Scenario("moderate", load=0.85),
        Scenario("light", load=0.4),
        Scenario("overload", load=1.3),
        Scenario("busy-reserving", load=0.95, reserve_growth=True),
    )
}


@dataclass(frozen=True)
class Trace:
    """Aligned columns [requests], by arrival. Tokens; seconds from the start."""

    arrival: NDArray[np.float64]
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    """What the model writes before it stops by itself: nobody but the simulated engine knows it."""
    max_tokens: NDArray[np.int64]
    """What the client allows: never less than `output`, mostly far more."""
    is_long: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.arrival)


def make_trace(scenario: Scenario, requests: int, tokens_per_second: float, seed: int) -> Trace:
    """`requests` arrivals with a mean of `scenario.load` times `tokens_per_second` output tokens a second.

    Short chats: prompts around 200 tokens, answers around 120 with a long tail, `max_tokens` 512 or 1,024. Long
    reasoning: prompts around 300, traces around 5,000 with a long tail up to `max_tokens` 16,384. The lengths are
    log-normal. Arrivals are a Poisson process whose rate alternates between calm and burst.
    """
    rng = np.random.default_rng(seed)
    is_long = rng.random(requests) < scenario.long_share
    prompt, output, max_tokens = draw_lengths(is_long, rng)
    mean_rate = scenario.load * tokens_per_second / output.mean()
    return Trace(_arrivals(scenario, requests, mean_rate, rng), prompt, output, max_tokens, is_long)


def draw_lengths(
    is_long: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    n = len(is_long)

    def lognormal(short: tuple[int, float], long: tuple[int, float]) -> NDArray[np.float64]:
        median = np.where(is_long, long[0], short[0])
        return np.exp(np.log(median) + np.where(is_long, long[1], short[1]) * rng.standard_normal(n))

    prompt = np.clip(lognormal((200, 0.8), (300, 0.8)), 8, 2000).astype(np.int64)
    max_tokens = np.where(is_long, 16_384, rng.choice([512, 1024], n)).astype(np.int64)
    output = np.clip(lognormal((120, 0.9), (5000, 0.7)), 1, max_tokens).astype(np.int64)
    return prompt, output, max_tokens


def _arrivals(scenario: Scenario, requests: int, mean_rate: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Times of a two-state Markov-modulated Poisson process of this mean rate, beginning calm."""
    calm, burst, factor = scenario.calm_seconds, scenario.burst_seconds, scenario.burst_factor
    calm_rate = mean_rate * (calm + burst) / (calm + burst * factor)
    periods: list[NDArray[np.float64]] = []
    begin, made, is_burst = 0.0, 0, False
    while made < requests:
        length = rng.exponential(burst if is_burst else calm)
        count = rng.poisson(calm_rate * (factor if is_burst else 1.0) * length)
        periods.append(begin + np.sort(rng.random(count)) * length)
        begin, made, is_burst = begin + length, made + count, not is_burst
    return np.concatenate(periods)[:requests]
