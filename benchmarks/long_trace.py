"""Time per output token against position, plain vLLM and ours in turns: `trifleet bench trace`.

Ours decodes one request from its prompt to its last token. A step's time depends only on what is in the KV cache, so
plain vLLM need not decode all the way as well: at each of POINTS positions it reads ours' text so far as a prompt, of
which its prefix cache holds all but the newest part, and decodes from there. Both engines run in this process and
decode TURN tokens at a time there, so that a busy machine slows both sides alike. Plain vLLM's pool holds the whole
request, ours its bound.
"""

from benchmarks.loads import BLOCK_SIZE, SIDES

# isort: split
import time
from typing import Any

from vllm import EngineArgs, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

import bundled
from benchmarks.machine import machine
from triattention.bounds import blocks_bound, cdiv
from triattention.config import CompressionConfig
from triattention.vllm import engine_arguments, on_this_machine

BUDGET, INTERVAL = 256, 128
CHUNK = 2048
"""Most tokens of a step. vLLM starts only where the KV memory holds a request that is prefilled in such chunks."""
POINTS = 16
TURN, TURNS = 32, 8
"""Two intervals at each position, so that ours pays for two compactions of its one request."""


def bench_long_trace(tokens: int = 32_768) -> dict[str, Any]:
    """The figures of the command: milliseconds per token at POINTS positions, means over TURNS x TURN tokens each."""
    about = machine("vllm", "torch")
    compression = CompressionConfig.model_validate(
        {"budget": BUDGET, "interval": INTERVAL, "window": 64, "statistics": bundled.STATISTICS}
    )
    bound = blocks_bound(4 * BLOCK_SIZE, tokens, BLOCK_SIZE, compression, in_flight_tokens=CHUNK)
    pools = {"plain": cdiv(tokens, BLOCK_SIZE), "ours": bound}
    plain = _Decoder(_engine(tokens, pools["plain"] + 1, None))  # and the null block
    ours = _Decoder(_engine(tokens, pools["ours"] + 1, compression))
    positions = [point * tokens // POINTS - TURN * TURNS for point in range(1, POINTS + 1)]
    milliseconds: dict[str, list[float]] = {side: [] for side in SIDES}
    ours.start(ours.engine.get_tokenizer().encode(bundled.demo_prompt(0, 2000)), tokens)
    for position in positions:
        ours.decode(position - len(ours.ids))
        plain.start(ours.ids, position + TURN * TURNS)
        seconds = dict.fromkeys(SIDES, 0.0)
        for turn in range(TURNS):
            for side, decoder in _turn({"plain": plain, "ours": ours}, turn):
                began = time.perf_counter()
                decoder.decode(TURN)
                seconds[side] += time.perf_counter() - began
        for side in SIDES:
            milliseconds[side].append(1000 * seconds[side] / (TURN * TURNS))
    for decoder in (plain, ours):
        decoder.engine.engine_core.shutdown()
    return about | {
        "output_tokens": tokens,
        "budget": BUDGET,
        "interval": INTERVAL,
        "pool_blocks": pools,
        "positions": positions,
        "milliseconds_per_token": milliseconds,
        "growth": {side: row[-1] / row[0] for side, row in milliseconds.items()},
    }


class _Decoder:
    """One engine with one request at a time."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.ids: list[int] = []
        """Tokens of the request so far, prompt included."""

    def start(self, prompt: list[int], total_tokens: int) -> None:
        """Returns when the prompt is computed and the first token is there."""
        self.ids = list(prompt)
        params = SamplingParams(
            max_tokens=total_tokens - len(prompt),
            ignore_eos=True,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(f"from-{len(prompt)}", {"prompt_token_ids": prompt}, params)
        while len(self.ids) == len(prompt):
            self._step()

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            self._step()

    def _step(self) -> None:
        for output in self.engine.step():
            assert isinstance(output, RequestOutput)
            self.ids += output.outputs[0].token_ids


def _turn(decoders: dict[str, _Decoder], number: int) -> list[tuple[str, _Decoder]]:
    """Who goes first changes every turn."""
    return list(decoders.items()) if number % 2 == 0 else list(reversed(decoders.items()))


def _engine(tokens: int, blocks: int, compression: CompressionConfig | None) -> LLMEngine:
    arguments: dict[str, Any] = {
        "model": str(bundled.MODEL),
        "max_model_len": tokens,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": blocks,
        "max_num_seqs": 1,
        "max_num_batched_tokens": CHUNK,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if compression is not None:
        arguments |= engine_arguments(compression)
        arguments["additional_config"]["triattention_reports"] = False
    return LLMEngine.from_engine_args(EngineArgs(**on_this_machine(arguments)))
