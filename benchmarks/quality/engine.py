"""One engine in this process answers all problems under one policy and budget. Owns the counts of blocks and time."""

import gc
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks.quality.problems import TOKENS_BEYOND_REPLY, Problem
from triattention.config import CompressionConfig
from triattention.vllm import engine_arguments, on_this_machine

BLOCK_SIZE = 32
"""Tokens; the smallest of the CPU backend (its default is 128): reductions are of peaks in whole blocks."""


@dataclass(frozen=True)
class Reply:
    """What came of one problem."""

    problem: Problem
    correct: bool
    tokens: int
    peak_blocks: int
    """Most KV blocks that the request held after any step."""


@dataclass(frozen=True)
class EngineRun:
    """One engine's answers to all problems."""

    replies: list[Reply]
    freed_blocks: int
    preemptions: int
    tokens_per_second: float
    bytes_per_block: int
    seconds: float


def run(
    model: Path,
    compression: CompressionConfig | None,
    problems: list[Problem],
    sequences: int,
    kv_cache_bytes: int,
    on_done: Callable[[bool], None] = lambda correct: None,
) -> EngineRun:
    """Answers every problem greedily, at most `sequences` at once; `on_done` hears of each.

    Without `compression` the engine is plain vLLM with reports. Needs VLLM_ENABLE_V1_MULTIPROCESSING=0, so that the
    blocks which a request holds can be read between two steps.
    Raises ValueError where the model's length or the KV memory is too small for the longest of them.
    """
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    arguments: dict[str, Any] = {**on_this_machine({}), **engine_arguments(compression)}
    asked = _asked(model, problems)
    longest = max(len(ids) + limit for ids, limit in asked)
    try:
        llm = LLM(
            str(model),
            block_size=BLOCK_SIZE,
            max_model_len=longest,  # vLLM wants KV memory for it, and the model's own may be far more
            max_num_seqs=sequences,
            kv_cache_memory_bytes=kv_cache_bytes,
            enforce_eager=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **arguments,
        )
    except ValueError as error:
        needed = re.search(r"([\d.]+ GiB) KV cache is needed", str(error))
        if needed is None:
            raise
        raise ValueError(
            f"--kv-cache-mib is {kv_cache_bytes >> 20}, but {longest} tokens, the longest prompt with its reply, take "
            f"{needed[1]} of KV memory: raise --kv-cache-mib, or ask for shorter replies (--max-tokens, --longest)"
        ) from None
    try:
        tokenizer = llm.get_tokenizer()
        engine = llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        waiting: dict[str, Problem] = {}
        for number, problem in enumerate(problems):
            ids, limit = asked[number]
            # Text is made once, at the end, and not for every token of every request.
            params = SamplingParams(
                temperature=0, max_tokens=limit, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
            engine.add_request(str(number), {"prompt_token_ids": ids}, params)
            waiting[str(number)] = problem
        peaks: defaultdict[str, int] = defaultdict(int)
        replies: dict[int, Reply] = {}
        began = time.monotonic()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            for request, blocks in scheduler.held_blocks().items():
                peaks[request] = max(peaks[request], blocks)
            for output in outputs:
                problem, reply = waiting.pop(output.request_id), output.outputs[0]
                answer = tokenizer.decode(reply.token_ids, skip_special_tokens=True)
                # What a reply that was cut off says last is a thought on its way, not the answer.
                correct = reply.finish_reason == "stop" and problem.is_correct(answer)
                peak = max(blocks for request, blocks in peaks.items() if _is(request, output.request_id))
                replies[int(output.request_id)] = Reply(problem, correct, len(reply.token_ids), peak)
                on_done(correct)
        seconds = time.monotonic() - began
        managers = scheduler.compacted
        return EngineRun(
            replies=[replies[number] for number in range(len(problems))],
            freed_blocks=sum(manager.freed_blocks for manager in managers),
            preemptions=scheduler.preemptions,
            tokens_per_second=sum(reply.tokens for reply in replies.values()) / seconds,
            bytes_per_block=sum(tensor.size for tensor in scheduler.kv_cache_config.kv_cache_tensors)
            // scheduler.kv_cache_config.num_blocks,
            seconds=seconds,
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _asked(model: Path, problems: list[Problem]) -> list[tuple[list[int], int]]:
    """Each problem's prompt in the model's tokens, and the most tokens of its reply. Starts no engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    config = EngineArgs(str(model)).create_model_config()
    tokenizer: Any = cached_tokenizer_from_config(config)
    asked = []
    for problem in problems:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        limit = problem.max_tokens or len(tokenizer.encode(problem.reply)) + TOKENS_BEYOND_REPLY
        if len(ids) + limit > config.max_model_len:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {limit} tokens of reply exceed the model's "
                f"{config.max_model_len}: shorten the prompt or lower --max-tokens"
            )
        asked.append((ids, limit))
    return asked


_answers: "Queue[tuple[int, bool]]"


def prepare(answers: "Queue[tuple[int, bool]]") -> None:
    """Makes this process one for `run_cell`: where it tells of answers, and that it ends with its parent."""
    global _answers
    _answers = answers
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_cell(
    model: Path,
    compression: CompressionConfig | None,
    problems: list[Problem],
    sequences: int,
    kv_cache_bytes: int,
    number: int,
) -> EngineRun:
    """`run` in a process of its own (see `prepare`); every answer is told as (`number`, whether it is right).

    Raises ValueError, one sentence, whatever vLLM raised: some of its errors do not get through to another process.
    """

    def done(correct: bool) -> None:
        _answers.put((number, correct))

    try:
        return run(model, compression, problems, sequences, kv_cache_bytes, done)
    except Exception as error:
        from triattention.vllm.diagnosis import sentence  # imports vLLM

        raise ValueError(sentence(error)) from None


def _is(internal: str, request: str) -> bool:
    """vLLM's scheduler knows a request by its id and a random suffix."""
    return internal == request or internal.startswith(f"{request}-")
