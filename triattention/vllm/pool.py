"""What the KV-cache groups of an engine have in common: one pool of blocks, and requests that hold some in every group.

Owns the most that a request can come to hold over all groups, and what follows from it: what is refused, what is
admitted beside what runs, in which chunks a preempted request comes back; and until when a request's blocks are
published. Each group's compactions are its manager's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.request import Request

from triattention.bounds import blocks_bound, cdiv, most_live_tokens
from triattention.vllm.kv_manager import CompactedAttentionManager


class Pool:
    def __init__(self, coordinator: KVCacheCoordinator, requests: Mapping[str, Request], max_model_len: int) -> None:
        """`requests`: the scheduler's table. At least one of the coordinator's groups is compacted."""
        managers = coordinator.single_type_managers
        self.compacted = [manager for manager in managers if isinstance(manager, CompactedAttentionManager)]
        self.others = [manager for manager in managers if not isinstance(manager, CompactedAttentionManager)]
        self.requests = requests
        self.max_model_len = max_model_len
        self.total_blocks = managers[0].block_pool.num_gpu_blocks - 1  # without the null block
        spec = self.compacted[0].spec
        self.batches = spec.decode_in_flight_tokens
        self.max_in_flight_tokens = spec.chunk_in_flight_tokens
        # Where a state must be saved at the end of a block, vLLM alone says where a chunk ends.
        self.cuts_chunks = not any(
            isinstance(manager.kv_cache_spec, MambaSpec) and manager.kv_cache_spec.mamba_cache_mode == "align"
            for manager in self.others
        )
        # Where hits end inside blocks, a group copies the last one on write, and both stay until that is done.
        self.copied_blocks = sum(manager.cache_hit_alignment_tokens < manager.block_size for manager in managers)
        self.promised_blocks: int | None = None
        """Blocks that what runs can come to hold; None when that has changed since it was counted."""
        for manager in self.compacted:
            manager.pool = self
        # For all groups at once: those of linear layers publish in several ways.
        coordinator.cache_blocks = partial(self._publish, coordinator.cache_blocks)

    def bound(self, request: Request) -> int:
        """Most blocks that the request can come to hold, over all groups: what admission reserves."""
        return self._bound(request, resumed=request.num_preemptions > 0)

    def bound_if_preempted(self, request: Request) -> int:
        """The same, should the request be preempted one day: if that is more than the pool has, it could not resume."""
        return self._bound(request, resumed=True)

    def _bound(self, request: Request, resumed: bool) -> int:
        own = sum(self.bound_in(manager, request, resumed) for manager in self.compacted)
        return own + self._others_bound(request, resumed)

    def bound_in(self, manager: CompactedAttentionManager, request: Request, resumed: bool) -> int:
        """Most blocks of one compacted group."""
        if manager.config.prompt == "compress":
            in_flight = self.max_in_flight_tokens
        else:
            in_flight = self._resumed_in_flight(request) if resumed else self.batches
        return blocks_bound(
            prompt_tokens=request.num_prompt_tokens,
            total_tokens=self._total_tokens(request),
            block_size=manager.block_size,
            config=manager.config,
            in_flight_tokens=in_flight,
        )

    def _total_tokens(self, request: Request) -> int:
        return min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)

    def _others_bound(self, request: Request, resumed: bool) -> int:
        """Most blocks of the groups that are not compacted, while the request is prefilled and while it decodes, and of
        copies in any group.
        """
        total = self._total_tokens(request)
        prefilled = total if resumed else min(total, request.num_prompt_tokens + self.batches)
        return self.copied_blocks + sum(
            max(
                self._most_of(manager, prefilled, self.max_in_flight_tokens),
                self._most_of(manager, total, self.batches),
            )
            for manager in self.others
        )

    def _most_of(self, manager: SingleTypeKVCacheManager, tokens: int, in_flight_tokens: int) -> int:
        """Most blocks of a sequence of `tokens` in a group that vLLM itself keeps short, as its admission has it."""
        spec, whole = manager.kv_cache_spec, cdiv(tokens, manager.block_size)
        if isinstance(spec, SlidingWindowSpec | ChunkedLocalAttentionSpec):
            return min(whole, spec.max_admission_blocks_per_request(in_flight_tokens, self.max_model_len))
        if isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align":
            # The state processed last, and what every step in flight ends with or saves on its way.
            return min(whole, 1 + self.batches * (1 + spec.num_prefill_checkpoint_blocks))
        if isinstance(spec, MambaSpec):
            return min(whole, 1 + cdiv(in_flight_tokens, manager.block_size))
        return whole

    def _resumed_in_flight(self, request: Request) -> int:
        """Most tokens behind its pinned prompt that are scheduled but not processed of a request that comes back.

        Its output is prefilled as it was decoded, `interval` tokens between two compactions; where the pool is too
        small even for these, in as few as it has room for.
        """
        if not self.cuts_chunks:
            return self.max_in_flight_tokens
        room = (self.total_blocks - self._others_bound(request, resumed=True)) // len(self.compacted)
        fits = min(
            (room - manager.pinned_blocks(request.num_prompt_tokens)) * manager.block_size
            - most_live_tokens(manager.block_size, manager.config)
            for manager in self.compacted
        )
        wanted = self.batches * max(self.compacted[0].config.interval, self.compacted[0].block_size)
        return max(self.batches, min(wanted, self.max_in_flight_tokens, fits))

    def resumed_chunk(self, request: Request, computed_tokens: int) -> int:
        """Most tokens that one step may compute of a request that was preempted, to stay within its bound."""
        if self.compacted[0].config.prompt == "compress":
            return self.max_in_flight_tokens // self.batches
        pinned = min(
            manager.pinned_blocks(request.num_prompt_tokens) * manager.block_size for manager in self.compacted
        )
        return max(0, pinned - computed_tokens) + self._resumed_in_flight(request) // self.batches

    def fits(self, request: Request, manager: CompactedAttentionManager, hits: Sequence[KVCacheBlock]) -> bool:
        """Whether all that run can still grow to their bounds beside this request. `hits`: its first blocks, if cached.

        A pinned block that several requests share counts once. A live one counts for each: every one of them drops it
        in its own time, and needs another then.
        """
        if self.promised_blocks is None:
            self.promised_blocks = self._promised()
        lacking = self.promised_blocks + self.bound(request) - self.total_blocks
        held = [block.block_id for block in hits[: manager.pinned_blocks(request.num_prompt_tokens)] if block.ref_cnt]
        if 0 < lacking <= len(held):
            lacking -= len({block.block_id for blocks in self._pinned(manager) for block in blocks}.intersection(held))
        if lacking <= 0:
            self.promised_blocks = None  # it is about to run
        return lacking <= 0

    def _promised(self) -> int:
        running = [request_id for request_id, blocks in self.compacted[0].req_to_blocks.items() if blocks]
        promised = sum(self.bound(self.requests[request_id]) for request_id in running)
        for manager in self.compacted:
            # Hits are a table's first blocks, so what is shared stands there; the long rest is not looked at.
            shared = [
                block.block_id
                for blocks in self._pinned(manager)
                for block in takewhile(lambda block: block.ref_cnt > 1, blocks)
            ]
            promised -= len(shared) - len(set(shared))
        return promised

    def _pinned(self, manager: CompactedAttentionManager) -> list[list[KVCacheBlock]]:
        return [
            blocks[: manager.pinned_blocks(self.requests[request_id].num_prompt_tokens)]
            for request_id, blocks in manager.req_to_blocks.items()
        ]

    def is_compacted(self, request_id: str) -> bool:
        """Whether it was compacted since it last began to run."""
        return any(request_id in manager.null_blocks for manager in self.compacted)

    def _publish(self, publish: Callable[[Request, int], None], request: Request, tokens: int) -> None:
        """After a compaction nothing: what any layer of any group computes from then on is approximate."""
        if not self.is_compacted(request.request_id):
            publish(request, tokens)


def limit_hits(
    manager: KVCacheManager, request: Request, blocks: KVCacheBlocks, tokens: int
) -> tuple[KVCacheBlocks, int]:
    """What `KVCacheManager.get_computed_blocks` found, or what it finds within the groups' `hit_limit`."""
    limits = [
        group.hit_limit(request)
        for group in manager.coordinator.single_type_managers
        if isinstance(group, CompactedAttentionManager)
    ]
    if tokens <= min(limits, default=tokens):
        return blocks, tokens
    # Looked up anew: a sliding-window group needs other blocks for a shorter hit.
    found, tokens, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, min(limits))
    return manager.create_kv_cache_blocks(found), tokens
