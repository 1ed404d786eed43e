"""The real scheduler over KV-cache groups of one's choice, with a worker that only counts: no model runs.

So models are scheduled that this machine has no kernels for, as hybrids of full attention and linear layers, whose
states vLLM keeps in blocks of their own.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.engine.conftest import BLOCK, asynchronous_scheduling
from triattention.config import CompressionConfig
from triattention.vllm import engine_arguments
from triattention.vllm.kv_manager import CompactedAttentionSpec
from triattention.vllm.scheduler import CompactionScheduler

FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)


class HandDriven:
    """One full-attention group, compacted, and `others` beside it."""

    def __init__(
        self,
        model: Path,
        config: CompressionConfig,
        others: Sequence[KVCacheSpec],
        *,
        blocks: int,
        in_flight: int,
        hash_block: int = BLOCK,
        **arguments: Any,
    ) -> None:
        """`in_flight`: steps scheduled but not processed, this one included; 2 is asynchronous scheduling."""
        arguments = {"dtype": "float32", "max_model_len": 4096, "block_size": BLOCK, **arguments}
        with asynchronous_scheduling() if in_flight > 1 else nullcontext():
            vllm_config = EngineArgs(
                str(model), skip_tokenizer_init=True, **arguments, **engine_arguments(config)
            ).create_engine_config()
        assert vllm_config.max_concurrent_batches == in_flight
        cache = vllm_config.cache_config
        cache.num_gpu_blocks = blocks
        cache.mamba_cache_mode = "align"
        specs = [CompactedAttentionSpec.from_full_attention(FULL, config, vllm_config), *others]
        groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(hash_block, sha256)
        self.scheduler = CompactionScheduler(
            vllm_config,
            KVCacheConfig(blocks, [], groups),
            StructuredOutputManager(vllm_config),
            block_size=max(spec.block_size for spec in specs),
            hash_block_size=hash_block,
        )
        self.in_flight = in_flight
        self.steps: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def add(self, name: str, prompt: list[int], tokens: int) -> Request:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        sampling.update_from_generation_config({}, None)
        request = Request(name, prompt, sampling, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        output = self.scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        sampled = [[] if self.scheduler.requests[name].is_prefill_chunk else [1] for name in names]
        self.steps.append((output, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)))
        if len(self.steps) == self.in_flight:
            self.scheduler.update_from_output(*self.steps.popleft())

    def run(self, steps: int) -> None:
        """Until all have ended. Fails if one has not within `steps`, or one ever held more than its bound."""
        for _ in range(steps):
            if not self.scheduler.requests:
                return
            self.step()
            for name, held in self.scheduler.held_blocks().items():
                assert held <= self.scheduler.pool.bound(self.scheduler.requests[name])
        raise AssertionError(f"still there after {steps} steps: {', '.join(self.scheduler.requests)}")

    def published(self) -> set[bytes]:
        """The hashes that a later request may hit."""
        return set(self.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache)
