"""The fleet's settings: one validated model, read from one YAML file.

Owns defaults and the sentences for mistakes. What the settings mean is decided elsewhere: the engine's in
`replicas/`, compression in `triattention.config`, the coordinator's in `admission.py`.
"""

import difflib
import ipaddress
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import bundled
from deploy.tiers import Tier, TierKeyError, check_keys, check_names, keyring
from replicas.access import Access
from replicas.limits import RequestLimits
from triattention.config import CompressionConfig

BUNDLED = "bundled"

# Arguments that FleetSettings or triattention.vllm set: naming them again in `engine.extra` would silently
# change what compression or the ledger relies on.
MANAGED_ARGUMENTS = frozenset(
    {
        "model",
        "served_model_name",
        "dtype",
        "max_model_len",
        "block_size",
        "num_gpu_blocks_override",
        "kv_cache_memory_bytes",
        "max_num_seqs",
        "max_num_batched_tokens",
        "scheduler_cls",
        "worker_cls",
        "additional_config",
    }
)


# Arguments of vLLM's own HTTP server, in whose place the fleet stands, and what the router would not see: they would do
# nothing, or half of what they say.
_WITHOUT_EFFECT = {
    **dict.fromkeys(("host", "port", "uds", "root_path", "grpc", "grpc_port", "headless", "api_server_count"), "http"),
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh"),
        "a proxy with TLS before the fleet",
    ),
    "api_key": "access and the keys of tiers",
    "lora_modules": "a fleet of its own for a model with the adapter merged into it",
    "disable_log_stats": "the fleet's metrics, which need them",
}
"""Argument -> what to use instead."""

_KV_CONNECTOR = ("kv_transfer_config", "kv_offloading_size", "kv_offloading_backend")


class SettingsError(ValueError):
    """The settings cannot be used; the message is one sentence per mistake, one per line."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineSettings(_Settings):
    """One vLLM engine. Names follow `vllm.AsyncEngineArgs`; sizes in tokens, blocks or bytes as named."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the model's own, but float32 on a CPU without instructions for bf16"
    )
    max_model_len: int = Field(default=8192, ge=1, description="tokens, prompt and output")
    block_size: int | None = Field(default=None, ge=1, description="tokens per KV block; None: vLLM's default")
    num_gpu_blocks: int | None = Field(
        default=None, ge=2, description="KV blocks, on a CPU too (num_gpu_blocks_override)"
    )
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1, description="KV memory; or leave both to vLLM")
    max_num_seqs: int = Field(default=64, ge=1, description="sequences that decode at once")
    max_num_batched_tokens: int | None = Field(default=None, ge=1, description="tokens per step; None: vLLM's default")
    extra: dict[str, Any] = Field(default_factory=dict, description="further AsyncEngineArgs, passed as they are")

    @field_validator("extra")
    @classmethod
    def _extra_is_free(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name, value in extra.items():
            if name in MANAGED_ARGUMENTS:
                raise ValueError(f"{name} is set by the fleet itself: use its own setting instead of engine.extra")
            if instead := _WITHOUT_EFFECT.get(name):
                raise ValueError(f"{name} has no effect in a fleet: use {instead} instead of engine.extra")
            if name.startswith("data_parallel"):
                raise ValueError(
                    f"{name} is {value}, but a replica is one engine to the coordinator: leave it out of engine.extra "
                    "and raise replicas"
                )
            if name in _KV_CONNECTOR:
                raise ValueError(
                    f"{name} is {value}, but the engine's reports travel where a KV connector's statistics would: "
                    "leave it out of engine.extra"
                )
        return extra

    @model_validator(mode="after")
    def _one_pool_size(self) -> "EngineSettings":
        if self.num_gpu_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError(
                f"num_gpu_blocks is {self.num_gpu_blocks} and kv_cache_memory_bytes is "
                f"{self.kv_cache_memory_bytes}: both set the size of the KV pool, so keep one of them"
            )
        return self


class CoordinatorSettings(_Settings):
    """Admission and placement. Times in seconds, sizes in requests, tokens or blocks as named."""

    queue_length: int = Field(default=256, ge=0, description="requests that may wait; 0: never wait")
    queue_deadline_seconds: float = Field(default=60.0, gt=0, description="longest wait before a 503")
    aging_seconds: float = Field(default=10.0, gt=0, description="waiting this long is worth one step of priority")
    lease_seconds: float = Field(
        default=10.0, gt=0, description="a reservation that no report mentions for so long ends"
    )
    stale_report_seconds: float = Field(default=2.0, gt=0, description="a replica silent for so long gets nothing new")
    heartbeat_seconds: float = Field(default=0.2, gt=0, description="longest time between two reports of a replica")
    watermark_blocks: int = Field(default=0, ge=0, description="blocks per replica that admission leaves free")
    growth_quantile: float = Field(
        default=0.99,
        gt=0.5,
        le=1,
        description="how sure it shall be that what runs on a replica fits there as it grows; 1: book whole bounds",
    )
    short_request_tokens: int = Field(
        default=1024,
        ge=0,
        description="requests of up to so many tokens (prompt and output, all sequences) are short",
    )
    long_placement: str = Field(default="most_headroom", description="placement policy of long requests")
    short_placement: str = Field(default="least_loaded_of_two", description="placement policy of short requests")

    @field_validator("long_placement", "short_placement")
    @classmethod
    def _policy_exists(cls, name: str) -> str:
        from deploy.placement import POLICIES

        if name not in POLICIES:
            raise ValueError(f'there is no placement policy "{name}": choose one of {", ".join(sorted(POLICIES))}')
        return name

    @model_validator(mode="after")
    def _silence_is_longer_than_heartbeat(self) -> "CoordinatorSettings":
        if self.stale_report_seconds <= self.heartbeat_seconds:
            raise ValueError(
                f"stale_report_seconds is {self.stale_report_seconds:g} but heartbeat_seconds is "
                f"{self.heartbeat_seconds:g}: every replica would look stale, so raise stale_report_seconds"
            )
        return self


class Autoscaling(_Settings):
    """When replicas come and go; `deploy/autoscaling.py` says how many there should be."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(ge=1)
    target_utilization: float = Field(
        default=0.7, gt=0, le=1, description="share of the blocks that may be committed or waited for"
    )
    upscale_delay_seconds: float = Field(default=10.0, ge=0, description="the need must last for so long")
    downscale_delay_seconds: float = Field(default=300.0, ge=0)
    gang_size: int = Field(
        default=1, ge=1, description="replicas that come and go together, as those that fill one node"
    )
    dry_run: bool = Field(default=False, description="only log what would be done")

    @model_validator(mode="after")
    def _limits_fit(self) -> "Autoscaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas} but min_replicas is {self.min_replicas}: raise max_replicas"
            )
        for name in ("min_replicas", "max_replicas"):
            value = getattr(self, name)
            if value % self.gang_size:
                raise ValueError(
                    f"{name} is {value}, which is no multiple of gang_size {self.gang_size}: replicas come and go in "
                    "groups of that size"
                )
        return self


class HttpSettings(_Settings):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)


class AccessSettings(_Settings):
    """Who may use the endpoint. Keys of the tiers are for requests, admin keys for everything."""

    required: bool | None = Field(
        default=None, description="whether requests need a key; null: on every address but the loopback"
    )
    keys_file: Path | None = Field(
        default=None, description="lines of `sha256:HEX TIER`, read again when it changes; the same path on every node"
    )
    admin_keys: tuple[str, ...] = Field(default=(), description="sha256:HEX or env:NAME, as the keys of a tier")

    @field_validator("admin_keys")
    @classmethod
    def _keys_are_no_secrets(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        return check_keys(keys)


class FleetSettings(_Settings):
    """A whole fleet. `model` is a path, a model id, or the word `bundled`."""

    model: str = BUNDLED
    served_model_name: str = Field(min_length=1, description="the name that clients ask for")
    replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    engine: EngineSettings = EngineSettings()
    compression: CompressionConfig | None = Field(default=None, description="null: plain vLLM, still reported")
    coordinator: CoordinatorSettings = CoordinatorSettings()
    autoscaling: Autoscaling | None = Field(default=None, description="null: always `replicas`")
    start_seconds: float = Field(
        default=3600.0, gt=0, description="`trifleet up` gives up on a fleet that is not ready by then"
    )
    drain_seconds: float = Field(
        default=3600.0, gt=0, description="a replica told to stop finishes what it has for at most so long"
    )
    tiers: dict[str, Tier] = Field(default_factory=dict, description='by name; "default" is for all other requests')
    access: AccessSettings = AccessSettings()
    limits: RequestLimits = RequestLimits()
    http: HttpSettings = HttpSettings()

    @field_validator("tiers")
    @classmethod
    def _tiers_have_names(cls, tiers: dict[str, Tier]) -> dict[str, Tier]:
        check_names(tiers)
        return tiers

    @model_validator(mode="before")
    @classmethod
    def _bundled_statistics(cls, values: Any) -> Any:
        """The bundled model brings its statistics: fill them in where the file names none."""
        if not isinstance(values, dict) or values.get("model", BUNDLED) != BUNDLED:
            return values
        compression = values.get("compression")
        if isinstance(compression, dict) and compression.get("statistics") is None:
            compression = {**compression, "statistics": bundled.STATISTICS}
            return {**values, "compression": compression}
        return values

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def model_path(self) -> str:
        """What vLLM loads: the bundled model's folder, or `model` as it is."""
        return str(bundled.MODEL) if self.model == BUNDLED else self.model

    def engine_arguments(self) -> dict[str, Any]:
        """For `vllm.AsyncEngineArgs`, beside those that `triattention.vllm.engine_arguments` gives."""
        engine = self.engine
        optional = {
            "block_size": engine.block_size,
            "num_gpu_blocks_override": engine.num_gpu_blocks,
            "kv_cache_memory_bytes": engine.kv_cache_memory_bytes,
            "max_num_batched_tokens": engine.max_num_batched_tokens,
        }
        return {
            "model": self.model_path,
            "served_model_name": self.served_model_name,
            "dtype": engine.dtype,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_num_seqs,
            **{name: value for name, value in optional.items() if value is not None},
            **engine.extra,
        }

    def keys_required(self, host: str) -> bool:
        """Whether requests to this address need a key. Raises `SettingsError` where others reach it and neither keys
        are named nor the settings say that none are needed."""
        required = not _is_loopback(host) if self.access.required is None else self.access.required
        tiers = self.tiers.values()
        if required and not (self.access.keys_file or self.access.admin_keys or any(tier.keys for tier in tiers)):
            raise SettingsError(
                f"http.host is {host} and requests need a key there, but the settings name none: make one with "
                "`trifleet keys new` and name it in access.keys_file or in a tier, or set access.required: false to "
                "let in whoever reaches that address."
            )
        return required

    def access_on(self, host: str) -> Access:
        """Who may use an endpoint on this address. Raises `SettingsError` as `keys_required`, and for a key that
        cannot be resolved here."""
        required = self.keys_required(host)
        file = self.access.keys_file
        try:
            keys = keyring(self.tiers, admin_keys=self.access.admin_keys, file=file and file.absolute())
        except TierKeyError as error:
            raise SettingsError(str(error)) from None
        return Access(keys, required)

    def without_compression(self) -> "FleetSettings":
        """The same fleet with the same KV memory, compression off."""
        return self.model_copy(update={"compression": None})


def load_settings(path: Path) -> FleetSettings:
    """Read and check a settings file. Raises `SettingsError`."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"there is no settings file {path}: name one with --file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"{path} cannot be read ({reason}): name a YAML file with --file") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no settings: write `name: value` lines, as in deploy/configs/local.yaml")
    return parse_settings(values, str(path))


def parse_settings(values: dict[str, Any], source: str = "settings") -> FleetSettings:
    """Check settings that were read elsewhere; `source` begins each sentence. Raises `SettingsError`."""
    try:
        return FleetSettings.model_validate(values)
    except ValidationError as error:
        sentences = [f"{source}: {_sentence(cast(dict[str, Any], e))}" for e in error.errors()]
        raise SettingsError("\n".join(sentences)) from None


def _sentence(error: dict[str, Any]) -> str:
    """One pydantic error as a sentence that names the setting, its value and what is wrong with it."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_names(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known here are {', '.join(known)}"
        return f"{name} is not a setting: {remedy}"
    if error["type"] == "missing":
        return f"{name} is missing: set it"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        return f"{name}: {reason}" if name else reason
    message = error["msg"].removeprefix("Input ")
    return f"{name} is {error['input']!r}: it {message}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _known_names(location: tuple[int | str, ...]) -> list[str]:
    """The settings that exist at a place such as ("engine",)."""
    parts: dict[str, type[BaseModel]] = {
        "engine": EngineSettings,
        "coordinator": CoordinatorSettings,
        "http": HttpSettings,
        "access": AccessSettings,
        "limits": RequestLimits,
        "compression": CompressionConfig,
        "tiers": Tier,
        "autoscaling": Autoscaling,
    }
    model = parts[str(location[0])] if location else FleetSettings
    return sorted(model.model_fields)
