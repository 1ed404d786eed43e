"""Assembles the Serve application from the settings: replicas behind the router, the coordinator beside them."""

import os
import time
from typing import Any

import ray
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.schema import LoggingConfig

from deploy.autoscaling import serve_config
from deploy.coordinator import NAME, NAMESPACE, Coordinator
from deploy.requests import Served
from deploy.router import Router, with_router
from deploy.settings import FleetSettings
from replicas.replica import Replica, ReplicaOptions

APP = "trifleet"
REPLICA, ROUTER = "replica", "router"

# The coordinator decides how many requests run; Serve's own limits (5 by default) must not.
UNLIMITED = 100_000
# A dead engine is replaced after three failed checks; Serve's default of 10 s makes that half a minute.
HEALTH_CHECK_SECONDS = 2.0
DRAIN_CHECK_SECONDS = 0.5
START_ATTEMPTS, START_PAUSE_SECONDS = 50, 0.2

# An engine on a CPU: one thread each, so that engines do not fight for the cores, and the worker inside the
# engine's process (vLLM insists on a second process only to bind OMP threads). oneDNN keeps the code that it has made
# for each number of tokens in a step, the last 1,024 by default, which is hundreds of MB; equal layers of a step need a
# few, and vLLM keeps 32 of its own for each layer. What vLLM compiles ahead of time it cannot load again on a CPU ("no
# attribute 'finalize_loading'"): each start would compile once more, in twice the time.
_CPU_ENGINE = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
# FlashInfer's sampler is vLLM's default on a GPU. It is compiled when the engine starts, by an nvcc that neither the
# image nor a machine with a driver alone has, and without one the engine ends. vLLM's own sampler needs none.
_GPU_ENGINE = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
_ENGINE = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}


def fleet(settings: FleetSettings) -> Application:
    """The whole fleet in the Ray cluster that runs this: the application, with a coordinator that waits for it.

    `trifleet up` calls it, and a Serve config file names it: `import_path: deploy.app:fleet`, with the settings as
    `args`. Serve calls it once for each change of that file.
    """
    application = build(settings)
    _start_coordinator(settings)
    return application


def coordinator_options() -> dict[str, Any]:
    """Ray's options that decide how fast the coordinator is; `trifleet bench router` measures it with the same."""
    # Ray records what happens to each call, which costs more than many of these calls do.
    return {"num_cpus": 0, "max_concurrency": 10_000, "enable_task_events": False}


def _start_coordinator(settings: FleetSettings) -> None:
    """Detached, so that it outlives whoever starts it, and on the head, which no scale-down takes away.

    One that runs with other settings is replaced. As after a crash, the replicas' next reports rebuild the ledger.
    """
    arguments = (settings.coordinator, settings.served_model_name, settings.tiers, settings.replicas)
    actor = ray.remote(Coordinator).options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        resources={HEAD_NODE_RESOURCE_NAME: 0.001},
        max_restarts=-1,
        **coordinator_options(),
    )
    for _ in range(START_ATTEMPTS):
        coordinator = actor.remote(*arguments)
        try:
            if ray.get(coordinator.runs_with.remote(*arguments)):
                return
            ray.kill(coordinator)
        except ray.exceptions.RayActorError:
            time.sleep(START_PAUSE_SECONDS)  # killed, but its name is not free yet
    raise RuntimeError(f"The coordinator did not start in {START_ATTEMPTS} attempts: look for its log in Ray's.")


def engine_environment(settings: FleetSettings) -> dict[str, str]:
    """Variables of a replica's process. What the user has set of those for GPUs stays."""
    if not settings.gpus_per_replica:
        return {**_ENGINE, **_CPU_ENGINE}
    return {**_ENGINE, **{name: os.environ.get(name, value) for name, value in _GPU_ENGINE.items()}}


def build(settings: FleetSettings) -> Application:
    access = settings.access_on(settings.http.host)
    allowances = {name: tier.allowance for name, tier in settings.tiers.items()}
    replica = serve.deployment(
        Replica,
        name=REPLICA,
        num_replicas=None if settings.autoscaling else settings.replicas,
        autoscaling_config=None
        if settings.autoscaling is None
        else serve_config(settings.autoscaling, settings.replicas, (NAME, NAMESPACE)),
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=DRAIN_CHECK_SECONDS,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        request_router_config=RequestRouterConfig(request_router_class="deploy.listing_router:ListingRouter"),
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"env_vars": engine_environment(settings)},
        },
    ).bind(
        ReplicaOptions(
            engine_arguments=settings.engine_arguments(),
            compression=settings.compression,
            heartbeat_seconds=settings.coordinator.heartbeat_seconds,
            coordinator=(NAME, NAMESPACE),
            access=access,
            limits=settings.limits,
            allowances=allowances,
        )
    )
    router = serve.deployment(
        Router,
        name=ROUTER,
        max_ongoing_requests=UNLIMITED,
        max_surge_percent=100,  # a change of settings starts the new ones first: without any, requests go unbooked
        # A line for each question of HAProxy says nothing that the replica's line for the request does not.
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={"num_cpus": 0},
    ).bind(
        replica,
        settings.engine_arguments(),
        Served(settings.served_model_name, settings.engine.max_model_len),
        settings.coordinator.queue_deadline_seconds,
        settings.tiers,
        access,
        settings.limits,
    )
    return with_router(replica, router)
