"""vLLM's scheduler plus three things: orders to the workers, refusal of what can never fit, capacity reports."""

import time
from bisect import bisect_left
from collections import defaultdict
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    SlidingWindowManager,
)
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from triattention.bounds import cdiv
from triattention.report import COMPACTION_BUCKETS_SECONDS, FIRST_COMPACTION_BUCKETS_SECONDS, REPORT_KEY, EngineReport
from triattention.vllm.kv_manager import CompactedAttentionManager
from triattention.vllm.orders import CompactionOrder, attach_orders, seconds_of
from triattention.vllm.pool import Pool, limit_hits
from triattention.vllm.support import REPORTS_KEY, check_supported, compression_config, sends_reports

logger = init_logger(__name__)

REPORT_INTERVAL_SECONDS = 0.02

NULLS_FIRST = (FullAttentionManager, SlidingWindowManager, ChunkedLocalAttentionManager)
"""vLLM's managers whose tables grow with the text and hold null blocks only before all others, if any."""


class CompactionScheduler(AsyncScheduler):
    """`AsyncScheduler` whose full-attention groups are compacted; without compression it only reports."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> "CompactionScheduler":
        is_async = vllm_config.scheduler_config.async_scheduling
        return super().__new__(cls if is_async else SynchronousCompactionScheduler)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if compression_config(self.vllm_config) is not None:
            check_supported(self.vllm_config)
        self.sends_reports = sends_reports(self.vllm_config) and self.log_stats
        connector = self.vllm_config.kv_transfer_config
        if self.sends_reports and connector is not None:
            raise ValueError(
                f"kv_transfer_config names {connector.kv_connector}, but reports travel where a KV connector's "
                "statistics would: unset kv_transfer_config and kv_offloading_size, or remove "
                f'"{REPORTS_KEY}" from additional_config.'
            )
        self.compacted: list[CompactedAttentionManager] = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, CompactedAttentionManager)
        ]
        if compression_config(self.vllm_config) is not None and not self.compacted:
            raise ValueError(
                'additional_config holds "triattention" settings but no layer is compacted: set worker_cls to '
                "triattention.vllm.worker.CompactionWorker as well."
            )
        if self.compacted:
            self.pool = Pool(self.kv_cache_manager.coordinator, self.requests, self.max_model_len)
        self.total_blocks = self.kv_cache_config.num_blocks - 1  # without the null block
        self.refused: list[Request] = []
        self.preemptions = 0
        self.peak_blocks_per_request = 0
        self.generated_tokens = 0
        self.step_seconds = 0.0
        self.compaction_seconds = 0.0
        self.compaction_counts = [0] * (len(COMPACTION_BUCKETS_SECONDS) + 1)
        self.first_compaction_seconds = 0.0
        self.first_compaction_counts = [0] * (len(FIRST_COMPACTION_BUCKETS_SECONDS) + 1)
        self.last_update = self.last_idle = time.monotonic()
        self.last_report = float("-inf")
        self.ended: dict[str, tuple[int, int]] = {}

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        orders: list[CompactionOrder] = []
        for manager in self.compacted:
            self._note_first_compactions(manager)
            orders += manager.orders
            manager.orders = []
        attach_orders(output, orders)
        if self.sends_reports:
            self._note_peak(output)
        return output

    def _note_peak(self, output: SchedulerOutput) -> None:
        """Only what this step gave blocks to can hold more than ever before."""
        cached = output.scheduled_cached_reqs
        grown = [request_id for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True) if new]
        for request_id in (*grown, *(new.req_id for new in output.scheduled_new_reqs)):
            self.peak_blocks_per_request = max(self.peak_blocks_per_request, self._held_by(request_id))

    def _note_first_compactions(self, manager: CompactedAttentionManager) -> None:
        """Their orders begin where the pinned prompt ends. A resumed request's first is not its first."""
        for order in manager.orders:
            request = self.requests[order.request_id]
            is_first = order.first_dead_block == manager.pinned_blocks(request.num_prompt_tokens)
            if is_first and request.num_preemptions == 0:
                seconds = time.time() - request.arrival_time
                self.first_compaction_seconds += seconds
                self.first_compaction_counts[bisect_left(FIRST_COMPACTION_BUCKETS_SECONDS, seconds)] += 1

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        return *limit_hits(self.kv_cache_manager, request, blocks, tokens), boundary, diverged

    def add_request(self, request: Request) -> None:
        if not self.requests:
            self.last_idle = time.monotonic()
        super().add_request(request)
        why = self._refusal(request) if self.compacted else None
        if why is not None:
            logger.error("Request %s is refused: %s", request.request_id, why)
            self.refused.append(self.requests[request.request_id])

    def _refusal(self, request: Request) -> str | None:
        """Why the request can never be served, in a sentence."""
        if request.resumable:
            return (
                "its prompt is streamed in pieces (resumable is True), but KV compression pins a prompt that is "
                "whole; send it in one piece, or serve the model without the triattention settings."
            )
        if request.mm_features and self.vllm_config.model_config.uses_mrope:
            return (
                "its image, video or audio shifts the positions of the tokens after it (M-RoPE), but KV compression "
                "scores keys from positions that count tokens; send text alone, or serve the model without the "
                "triattention settings."
            )
        if (
            request.mm_features
            and self.vllm_config.model_config.is_mm_prefix_lm
            and self.compacted[0].config.prompt == "compress"
        ):
            return (
                "its image is attended to in both directions, by position in the prompt, but prompt is compress, and "
                "slots behind a compaction are not positions; send text alone, or set prompt to pin."
            )
        needed = self.pool.bound_if_preempted(request)
        if needed <= self.total_blocks:
            return None
        return (
            f"with its prompt of {request.num_prompt_tokens} tokens, max_tokens {request.max_tokens} and the engine's "
            f"max_num_batched_tokens {self.scheduler_config.max_num_batched_tokens} it can need {needed} KV blocks, "
            f"but the engine has {self.total_blocks}; shorten the prompt, lower max_num_batched_tokens or enlarge the "
            "KV cache."
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Also ends the refused requests. An engine step follows every arrival, so this is at once."""
        self._measure(scheduler_output, model_runner_output)
        refused, self.refused = self.refused, []
        endings: defaultdict[int, list[EngineCoreOutput]] = defaultdict(list)
        for request in refused:
            if not request.is_finished():
                self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
                endings[request.client_index].append(
                    EngineCoreOutput(
                        request_id=request.request_id,
                        new_token_ids=[],
                        finish_reason=request.get_finished_reason(),
                    )
                )
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, ended in endings.items():
            if client in outputs:
                outputs[client].outputs.extend(ended)
            else:
                outputs[client] = EngineCoreOutputs(outputs=ended)
        return outputs

    def _measure(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        """Steps follow each other without a pause while there is work, so a step's time is that since the last."""
        now = time.monotonic()
        if scheduler_output.total_num_scheduled_tokens > 0:
            self.step_seconds += now - max(self.last_update, self.last_idle)
            self.generated_tokens += sum(map(len, model_runner_output.sampled_token_ids))
        self.last_update = now
        for seconds in seconds_of(model_runner_output):
            self.compaction_seconds += seconds
            self.compaction_counts[bisect_left(COMPACTION_BUCKETS_SECONDS, seconds)] += 1

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Where vLLM shortens chunks for speculative decoding: here those of a preempted request that comes back."""
        if num_new_tokens > 1 and request.num_preemptions and self.compacted and self.pool.cuts_chunks:
            return min(num_new_tokens, self.pool.resumed_chunk(request, num_computed_tokens))
        if self.num_prefill_lookahead:
            return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return num_new_tokens

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.preemptions += 1
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.sends_reports:
            self.ended[request.request_id] = (request.num_prompt_tokens, request.num_output_tokens)
        return super()._free_request(request, *args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Carries the report in the free-form connector dict, for a custom StatLogger of the front end."""
        stats = super().make_stats(*args, **kwargs)
        if stats is None or not self.sends_reports:
            return stats
        now = time.monotonic()
        if now - self.last_report >= REPORT_INTERVAL_SECONDS or not self.running:
            self.last_report = now
            stats.kv_connector_stats = {REPORT_KEY: self.report(stats).to_dict()}
            self.ended = {}
        return stats

    def held_blocks(self) -> dict[str, int]:
        """Request id -> blocks held, over all KV-cache groups, for every request that holds any."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        holders = dict.fromkeys(request_id for manager in managers for request_id in manager.req_to_blocks)
        return {request_id: self._held_by(request_id) for request_id in holders}

    def _held_by(self, request_id: str) -> int:
        held = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            table = manager.req_to_blocks.get(request_id, ())
            if isinstance(manager, CompactedAttentionManager):
                held += manager.held_blocks(request_id)
            elif type(manager) in NULLS_FIRST:
                held += len(table) - bisect_left(table, True, key=lambda block: not block.is_null)
            else:
                held += sum(not block.is_null for block in table)
        return held

    def report(self, stats: SchedulerStats) -> EngineReport:
        config = self.kv_cache_config
        held = self.held_blocks()
        chunked = any(manager.config.prompt == "compress" for manager in self.compacted)
        return EngineReport(
            block_size=self.block_size,
            bytes_per_block=sum(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks,
            total_blocks=self.total_blocks,
            free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
            running=stats.num_running_reqs,
            waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
            in_flight_tokens=self.vllm_config.max_in_flight_tokens
            if chunked
            else self.vllm_config.max_concurrent_batches,
            preemptions=self.preemptions,
            compactions=sum(manager.compactions for manager in self.compacted),
            freed_blocks=sum(manager.freed_blocks for manager in self.compacted),
            evicted_tokens=sum(manager.evicted_tokens for manager in self.compacted),
            stranded_slots=sum(manager.stranded_slots for manager in self.compacted),
            peak_blocks_per_request=self.peak_blocks_per_request,
            pinned_blocks=sum(
                min(manager.held_blocks(request_id), manager.pinned_blocks(self.requests[request_id].num_prompt_tokens))
                for manager in self.compacted
                for request_id in manager.req_to_blocks
            ),
            uncompressed_blocks=sum(
                cdiv(self.requests[request_id].num_computed_tokens, self.block_size) for request_id in held
            ),
            generated_tokens=self.generated_tokens,
            step_seconds=self.step_seconds,
            compaction_seconds=self.compaction_seconds,
            compaction_counts=tuple(self.compaction_counts),
            first_compaction_seconds=self.first_compaction_seconds,
            first_compaction_counts=tuple(self.first_compaction_counts),
            held_blocks=held,
            output_tokens={request_id: self.requests[request_id].num_output_tokens for request_id in held},
            ended=self.ended,
        )


class SynchronousCompactionScheduler(CompactionScheduler):
    """With synchronous scheduling: without what `AsyncScheduler` adds for every request and step."""

    _update_after_schedule = Scheduler._update_after_schedule
    _update_request_with_output = Scheduler._update_request_with_output
