"""Random arrivals, chunks, decodes, compactions, preemptions, aborts and cache hits against a plain model.

Drives vLLM's real KVCacheManager with our manager in it, in the order in which the scheduler calls it, and a simulated
worker whose cache maps (block, offset) to what was written there: (family, position, exact). Requests of one family
are prefixes of one endless text, so prompts of one hit blocks that another generated. `test_state_machine` runs it.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from tests.unit.hole_fills import hole_fills
from triattention.config import CompressionConfig
from triattention.vllm.compactor import independent
from triattention.vllm.kv_manager import CompactedAttentionManager, CompactedAttentionSpec
from triattention.vllm.orders import CompactionOrder
from triattention.vllm.pool import Pool, limit_hits

BLOCK, POOL, CHUNK = 16, 30, 40
Token = tuple[int, int, bool]  # family, position, whether it was computed from an uncompacted past


def text(family: int, start: int, end: int) -> list[int]:
    return [family * 100_000 + position for position in range(start, end)]


@dataclass
class Tracked:
    request: Request
    family: int
    live: set[int] = field(default_factory=set)
    """Positions that the model says attention must see."""
    compacted: bool = False


@dataclass
class Scheduled:
    """One request's share of a step in flight."""

    tracked: Tracked
    tokens: int
    attempt: int


class Engine(RuleBasedStateMachine):
    lag = 0  # steps in flight when the next one is scheduled: 1 is async scheduling
    config = CompressionConfig(budget=32, interval=24, window=4, policy="random", reserve_growth=False)
    steps_taken = 0
    """Over all examples of a class and its subclasses."""

    def __init__(self) -> None:
        super().__init__()
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        spec = CompactedAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, compression=self.config,
            decode_in_flight_tokens=1 + self.lag, chunk_in_flight_tokens=(1 + self.lag) * CHUNK,
        )  # fmt: skip
        self.manager = KVCacheManager(
            KVCacheConfig(POOL, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=2000, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=True,
        )  # fmt: skip
        (ours,) = self.manager.coordinator.single_type_managers
        assert isinstance(ours, CompactedAttentionManager)
        self.ours, self.pool = ours, self.manager.block_pool
        self.requests: dict[str, Request] = {}
        self.bounds = Pool(self.manager.coordinator, self.requests, max_model_len=2000)
        self.waiting: deque[Tracked] = deque()
        self.running: list[Tracked] = []
        self.in_flight: deque[list[Scheduled]] = deque()
        self.cache: dict[tuple[int, int], Token] = {}
        self.draw = random.Random(0)
        self.count = 0

    @rule(family=st.integers(0, 2), tokens=st.integers(1, 150))
    def arrive(self, family: int, tokens: int) -> None:
        if len(self.waiting) > 3:
            return
        self.count += 1
        request = Request(
            f"r{self.count}", text(family, 0, tokens), SamplingParams(max_tokens=300), None, block_hasher=self.hasher
        )
        self.requests[request.request_id] = request
        self.waiting.append(Tracked(request, family))

    @rule(steps=st.integers(1, 40), chunk=st.integers(1, CHUNK), seed=st.integers(0, 2**20))
    def run(self, steps: int, chunk: int, seed: int) -> None:
        self.draw.seed(seed)
        for _ in range(steps):
            self.step(chunk)
            self.blocks_are_conserved()
            self.nothing_approximate_is_published()

    def step(self, chunk: int) -> None:
        """One scheduler step and its execution, in vLLM's order: running requests first, then one waiting."""
        Engine.steps_taken += 1
        scheduled: list[Scheduled] = []
        preempted = False
        for tracked in list(self.running):
            if tracked not in self.running:
                continue  # preempted by an earlier one in this step
            new = max(1, tracked.request.num_tokens - tracked.request.num_computed_tokens)
            new = min(new, self.longest(chunk, tracked.request, tracked.request.num_computed_tokens))
            while self.manager.allocate_slots(tracked.request, new) is None:
                assert not self.config.reserve_growth, "a running request cannot grow although its growth is reserved"
                victim, preempted = self.running[-1], True
                self.preempt(victim)
                scheduled = [s for s in scheduled if s.tracked is not victim]
                if victim is tracked:
                    break
            else:
                scheduled.append(Scheduled(tracked, new, tracked.request.num_preemptions))
        if self.waiting and not preempted and self.waiting[0].request.num_in_flight_tokens == 0:
            self.admit(chunk, scheduled)
        self.execute(scheduled)
        for share in scheduled:
            share.tracked.request.num_computed_tokens += share.tokens
            share.tracked.request.num_in_flight_tokens += share.tokens
        self.in_flight.append(scheduled)
        if len(self.in_flight) > self.lag:
            self.settle(self.in_flight.popleft())

    def longest(self, chunk: int, request: Request, computed: int) -> int:
        return min(chunk, self.bounds.resumed_chunk(request, computed)) if request.num_preemptions else chunk

    def admit(self, chunk: int, scheduled: list[Scheduled]) -> None:
        tracked = self.waiting[0]
        request = tracked.request
        hits, hit_tokens = limit_hits(self.manager, request, *self.manager.get_computed_blocks(request)[:2])
        new = min(self.longest(chunk, request, hit_tokens), request.num_tokens - hit_tokens)
        if self.manager.allocate_slots(request, new, hit_tokens, hits, full_sequence_must_fit=True) is None:
            return
        self.waiting.popleft()
        self.running.append(tracked)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit_tokens
        tracked.live, tracked.compacted = set(range(hit_tokens)), False
        scheduled.append(Scheduled(tracked, new, request.num_preemptions))

    def settle(self, step: list[Scheduled]) -> None:
        for share in step:
            request = share.tracked.request
            request.num_in_flight_tokens -= share.tokens
            stale = request.num_preemptions != share.attempt or share.tracked not in self.running
            if stale or request.num_computed_tokens - request.num_in_flight_tokens < request.num_tokens:
                continue
            request.append_output_token_ids(text(share.tracked.family, request.num_tokens, request.num_tokens + 1))
            self.manager.cache_blocks(request, request.num_tokens - 1)
            if request.num_output_tokens >= request.max_tokens:
                self.finish(share.tracked)

    def preempt(self, tracked: Tracked) -> None:
        self.manager.free(tracked.request)
        self.running.remove(tracked)
        tracked.request.num_computed_tokens = 0
        tracked.request.num_preemptions += 1
        tracked.request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(tracked)

    def finish(self, tracked: Tracked) -> None:
        self.manager.free(tracked.request)
        self.running.remove(tracked)
        del self.requests[tracked.request.request_id]

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 10))
    def abort(self, index: int) -> None:
        self.finish(self.running[index % len(self.running)])

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 10))
    def preempt_any(self, index: int) -> None:
        self.preempt(self.running[index % len(self.running)])

    def execute(self, scheduled: list[Scheduled]) -> None:
        """The simulated worker: orders first, then the writes of this step."""
        orders, self.ours.orders = self.ours.orders, []
        for batch in independent(orders):
            # Carried out at once, so in any order; but each after those it is not independent of.
            for order in self.draw.sample(batch, len(batch)):
                self.compact(order)
        writers: dict[int, Tracked] = {}
        for share in scheduled:
            tracked, start = share.tracked, share.tracked.request.num_computed_tokens
            table = self.ours.req_to_blocks[tracked.request.request_id]
            for position in range(start, start + share.tokens):
                block = table[position // BLOCK]
                assert not block.is_null, "wrote into the null block"
                assert writers.setdefault(block.block_id, tracked) is tracked, "a block has two writers"
                self.cache[block.block_id, position % BLOCK] = (tracked.family, position, not tracked.compacted)
                tracked.live.add(position)
            self.check_view(tracked, start + share.tokens)

    def compact(self, order: CompactionOrder) -> None:
        tracked = next((t for t in self.running if t.request.request_id == order.request_id), None)
        tokens = order.processed_tokens - order.first_dead_block * BLOCK
        dead = (order.first_live_block - order.first_dead_block) * BLOCK
        score = torch.tensor([[[self.draw.random() for _ in range(tokens)]]])
        score[..., tokens - self.config.window :] = 2
        for block in order.protected_blocks:
            score[..., block * BLOCK : (block + 1) * BLOCK] = 2
        kept = torch.zeros(1, 1, tokens, dtype=torch.bool)
        kept.scatter_(-1, score.topk(tokens - dead).indices, True)
        slots = [(block, offset) for block in order.block_ids for offset in range(BLOCK)]
        if tracked is not None:
            processed = set(range(order.processed_tokens))
            pinned = set(range(order.first_dead_block * BLOCK)) if not tracked.compacted else set()
            if tracked.compacted:
                end = self.ours.pinned_blocks(tracked.request.num_prompt_tokens) * BLOCK
                pinned = {p for p in tracked.live if p < end}
            survivors = {self.cache[slots[i]][1] for i in kept.flatten().nonzero().flatten().tolist()}
            tracked.live = (tracked.live - processed) | pinned | survivors
            tracked.compacted = True
        moves = hole_fills(kept, dead)
        for source, target in zip(moves.source.tolist(), moves.target.tolist(), strict=True):
            block = self.pool.blocks[slots[target][0]]
            if tracked is not None:
                assert block.ref_cnt == 1, "wrote into a block that another request reads"
                assert block.block_hash is None, "wrote into a block that later requests may hit"
            self.cache[slots[target]] = self.cache[slots[source]]

    def check_view(self, tracked: Tracked, length: int) -> None:
        """What attention reads through the squeezed row is exactly what the model says is live."""
        table = self.ours.req_to_blocks[tracked.request.request_id]
        seen = [
            self.cache[block.block_id, offset]
            for index, block in enumerate(table)
            if not block.is_null
            for offset in range(min(BLOCK, length - index * BLOCK))
        ]
        assert all(family == tracked.family for family, _, _ in seen), "another request's tokens are seen"
        positions = [position for _, position, _ in seen]
        assert len(positions) == len(set(positions)), "a token is seen twice"
        assert set(positions) == tracked.live, "what is read back is not what is live"
        held, bound = sum(not b.is_null for b in table), self.bounds.bound(tracked.request)
        assert held <= bound, f"live blocks exceed the bound: {held} > {bound}"

    @invariant()
    def blocks_are_conserved(self) -> None:
        held = {
            b.block_id for t in self.running for b in self.ours.req_to_blocks[t.request.request_id] if not b.is_null
        }
        assert len(held) + self.pool.get_num_free_blocks() == POOL - 1, "blocks are lost or held twice"
        for tracked in self.running:
            table = self.ours.req_to_blocks[tracked.request.request_id]
            held_blocks = self.ours.held_blocks(tracked.request.request_id)
            assert held_blocks == sum(not b.is_null for b in table), "a request's blocks are miscounted"

    @invariant()
    def nothing_approximate_is_published(self) -> None:
        for block in self.pool.blocks:
            if block.block_hash is not None:
                tokens = [self.cache[block.block_id, offset] for offset in range(BLOCK)]
                assert all(exact for _, _, exact in tokens), "an approximate block is published"
                first = tokens[0][1]
                run = list(range(first, first + BLOCK))
                assert [position for _, position, _ in tokens] == run, "a published block is not what its hash says"
                assert first % BLOCK == 0

    def teardown(self) -> None:
        for tracked in list(self.running):
            self.finish(tracked)
        assert self.pool.get_num_free_blocks() == POOL - 1, "blocks are lost or held twice"
