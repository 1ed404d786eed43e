"""Every metric of ours, by name: what dashboards, tests and the exposition import.

`triattention_` is what the engines say of themselves, `trifleet_` what the coordinator knows and decides.
Labels are `model`, `replica`, `reason`, `class` and `tier`; never a request or a key, so the number of series is
bounded by the number of replicas and of tiers. An engine that starts anew starts its counters anew, as Prometheus
expects of one.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
REPLICA = ("model", "replica")
FLEET = ("model",)
TIER = ("model", "tier")


@dataclass(frozen=True)
class Descriptor:
    """A metric as Prometheus shows it: `name` is the whole name, with `_total` for counters."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]


COMPACTIONS = Descriptor("triattention_compactions_total", "counter", "Compactions of a request's KV cache.", REPLICA)
FREED_BLOCKS = Descriptor(
    "triattention_freed_blocks_total", "counter", "KV blocks that compactions gave back to the pool.", REPLICA
)
RECLAIMED_BYTES = Descriptor(
    "triattention_reclaimed_bytes_total", "counter", "Bytes of the freed blocks, over all layers.", REPLICA
)
EVICTED_TOKENS = Descriptor(
    "triattention_evicted_tokens_total", "counter", "Tokens that compactions dropped, per KV head.", REPLICA
)
STRANDED_SLOTS = Descriptor(
    "triattention_stranded_slots",
    "gauge",
    "Live slots lost to alignment after the compactions so far; 0 by construction.",
    REPLICA,
)
PREEMPTIONS = Descriptor(
    "triattention_preemptions_total", "counter", "Requests that lost all their blocks to others.", REPLICA
)
PEAK_BLOCKS_PER_REQUEST = Descriptor(
    "triattention_peak_blocks_per_request", "gauge", "Most KV blocks that one request has held.", REPLICA
)
PINNED_BLOCKS = Descriptor(
    "triattention_pinned_blocks",
    "gauge",
    "Held KV blocks of pinned prompts; one that several requests share counts for each.",
    REPLICA,
)
UNCOMPRESSED_BLOCKS = Descriptor(
    "triattention_uncompressed_blocks",
    "gauge",
    "KV blocks that the requests in the engine would hold without compaction.",
    REPLICA,
)
COMPACTION_SECONDS = Descriptor(
    "triattention_compaction_seconds", "histogram", "Time of one compaction: score, select and move.", REPLICA
)
FIRST_COMPACTION_SECONDS = Descriptor(
    "triattention_first_compaction_seconds",
    "histogram",
    "Time from a request's arrival to its first compaction.",
    REPLICA,
)
STEP_SECONDS = Descriptor(
    "triattention_step_seconds_total", "counter", "Time in engine steps, compaction included.", REPLICA
)
GENERATED_TOKENS = Descriptor("triattention_generated_tokens_total", "counter", "Tokens generated.", REPLICA)
BLOCK_TOKENS = Descriptor("triattention_block_tokens", "gauge", "Tokens that one KV block holds.", REPLICA)
BLOCK_BYTES = Descriptor("triattention_block_bytes", "gauge", "Bytes of one KV block, over all layers.", REPLICA)

GPUS = Descriptor("triattention_gpus", "gauge", "GPUs that the replica decodes on, where NVML is there.", REPLICA)
GPU_MEMORY_BYTES = Descriptor("triattention_gpu_memory_bytes", "gauge", "Memory of the replica's GPUs.", REPLICA)
GPU_MEMORY_USED_BYTES = Descriptor(
    "triattention_gpu_memory_used_bytes", "gauge", "Memory in use on the replica's GPUs, by whomever.", REPLICA
)
GPU_POWER_WATTS = Descriptor("triattention_gpu_power_watts", "gauge", "Power that the replica's GPUs draw.", REPLICA)
GPU_ENERGY_JOULES = Descriptor(
    "triattention_gpu_energy_joules_total", "counter", "Energy that the replica's GPUs took since its start.", REPLICA
)

TOTAL_BLOCKS = Descriptor("trifleet_total_blocks", "gauge", "KV blocks of the replica's pool.", REPLICA)
FREE_BLOCKS = Descriptor("trifleet_free_blocks", "gauge", "Free KV blocks, as last reported.", REPLICA)
HELD_BLOCKS = Descriptor("trifleet_held_blocks", "gauge", "KV blocks in use, as last reported.", REPLICA)
RESERVED_BLOCKS = Descriptor(
    "trifleet_reserved_blocks", "gauge", "Blocks promised to requests that no report shows yet.", REPLICA
)
PREDICTED_BLOCKS = Descriptor(
    "trifleet_predicted_blocks",
    "gauge",
    "Blocks that running requests may still take, up to their bound.",
    REPLICA,
)
HEADROOM_BLOCKS = Descriptor(
    "trifleet_headroom_blocks", "gauge", "Free less reserved, predicted and watermark blocks.", REPLICA
)
DRIFT_BLOCKS = Descriptor(
    "trifleet_ledger_drift_blocks",
    "gauge",
    "Held blocks that no reservation explains; negative where requests share prefix blocks.",
    REPLICA,
)
REPORT_AGE = Descriptor("trifleet_report_age_seconds", "gauge", "Age of the replica's last report.", REPLICA)
FRESH = Descriptor(
    "trifleet_replica_fresh", "gauge", "1 while the replica reports; 0 takes it out of placement.", REPLICA
)
DRAINING = Descriptor(
    "trifleet_replica_draining",
    "gauge",
    "1 while the replica was told to stop and finishes what it has.",
    REPLICA,
)
RUNNING = Descriptor("trifleet_running_requests", "gauge", "Sequences that decode, as last reported.", REPLICA)
WAITING = Descriptor(
    "trifleet_waiting_requests", "gauge", "Sequences that wait inside the engine, as last reported.", REPLICA
)
RESERVATIONS = Descriptor("trifleet_reservations", "gauge", "Requests booked on the replica.", REPLICA)
PLACEMENTS = Descriptor(
    "trifleet_placements_total", "counter", "Requests placed on the replica, by reason.", (*REPLICA, "reason")
)

ADMISSIONS = Descriptor("trifleet_admissions_total", "counter", "Requests placed on any replica.", TIER)
REJECTIONS = Descriptor("trifleet_rejections_total", "counter", "Requests refused, by reason.", (*TIER, "reason"))
QUEUE_LENGTH = Descriptor(
    "trifleet_queue_length", "gauge", "Requests that wait for a replica, by class.", (*TIER, "class")
)
QUEUED_BLOCKS = Descriptor("trifleet_queued_blocks", "gauge", "Blocks that the waiting requests need.", FLEET)
QUEUE_WAIT = Descriptor(
    "trifleet_queue_wait_seconds", "histogram", "Time from submission to placement.", (*TIER, "class")
)
LEASE_EXPIRATIONS = Descriptor(
    "trifleet_lease_expirations_total", "counter", "Reservations that ended unheard of.", FLEET
)
REPORTS_IGNORED = Descriptor(
    "trifleet_reports_ignored_total",
    "counter",
    "Reports that were duplicate, overtaken or of a past epoch.",
    FLEET,
)

RETRIES = Descriptor(
    "trifleet_retries_total",
    "counter",
    "Requests placed anew because their replica failed before the first byte of its answer.",
    FLEET,
)
PROBES = Descriptor("trifleet_probes_total", "counter", "Silent replicas that were asked for a report.", FLEET)
WANTED_REPLICAS = Descriptor(
    "trifleet_wanted_replicas", "gauge", "Replicas that autoscaling, or else the settings, ask for.", FLEET
)
COORDINATOR_START = Descriptor(
    "trifleet_coordinator_start_time_seconds",
    "gauge",
    "When the coordinator started, in seconds since 1970; it changes with every restart.",
    FLEET,
)
ENDED_REQUESTS = Descriptor(
    "trifleet_ended_requests_total", "counter", "Requests that ended on a replica, in whatever way.", TIER
)
PROMPT_TOKENS = Descriptor("trifleet_prompt_tokens_total", "counter", "Prompt tokens of ended requests.", TIER)
OUTPUT_TOKENS = Descriptor(
    "trifleet_output_tokens_total", "counter", "Output tokens of ended requests.", (*TIER, "class")
)
BLOCK_SECONDS = Descriptor(
    "trifleet_kv_block_seconds_total",
    "counter",
    "KV blocks times the seconds for which ended requests held them.",
    TIER,
)
FIRST_TOKEN = Descriptor(
    "trifleet_first_token_seconds",
    "histogram",
    "Time from a request's arrival to its first answered byte.",
    (*TIER, "class"),
)
PER_TOKEN = Descriptor(
    "trifleet_output_token_seconds",
    "histogram",
    "A sequence's mean time per output token after its first.",
    (*TIER, "class"),
)
FIRST_TOKEN_TARGET = Descriptor(
    "trifleet_first_token_target_seconds", "gauge", "The tier's latency target; 0 where it has none.", TIER
)

METRICS: tuple[Descriptor, ...] = tuple(value for value in globals().values() if isinstance(value, Descriptor))
