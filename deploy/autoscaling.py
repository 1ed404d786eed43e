"""How many replicas the fleet should have: committed and queued blocks against what the replicas have.

`wanted_replicas` decides, plain arithmetic. `BlockPolicy` is the Ray Serve autoscaling policy around it: it runs in
Serve's controller, asks the coordinator, and never waits for it. Serve applies the delays and the limits.
"""

import logging
import math
from concurrent.futures import Future
from typing import Any

import ray
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deploy.messages import FleetLoad
from deploy.settings import Autoscaling

logger = logging.getLogger("ray.serve")

# How often Serve's policy is fed; the controller's loop runs about ten times a second.
METRICS_SECONDS = 1.0


def wanted_replicas(load: FleetLoad, current: int, settings: Autoscaling) -> int:
    """Replicas with which the committed and queued blocks are at most the target's share of the pools.

    Never fewer than could hold what is committed, and never fewer than now while requests wait: the requests of a
    replica that goes are finished by it, but those that come then find the rest as full as it was counted here.
    `current` while nothing is known.
    """
    if not load.replicas or not load.capacity_blocks:
        return current
    blocks_per_replica = load.capacity_blocks / load.replicas
    demand = load.committed_blocks + load.queued_blocks
    wanted = math.ceil(demand / (settings.target_utilization * blocks_per_replica))
    if load.queued_blocks:
        wanted = max(wanted, current)
    wanted = math.ceil(max(wanted, 1) / settings.gang_size) * settings.gang_size
    return min(max(wanted, settings.min_replicas), settings.max_replicas)


class BlockPolicy:
    """Called by Serve's controller with its context; answers from the coordinator's last word.

    Each call leaves a question for the next one, so the controller never waits. Without an answer nothing changes.
    """

    def __init__(self, settings: dict[str, Any], coordinator: list[str]) -> None:
        self._settings = Autoscaling.model_validate(settings)
        self._name, self._namespace = coordinator
        self._question: Future[FleetLoad] | None = None
        self._load: FleetLoad | None = None
        self._said: int | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        target = context.target_num_replicas
        self._collect_answer()
        wanted = target if self._load is None else wanted_replicas(self._load, target, self._settings)
        if self._question is None:
            self._ask(wanted)
        if wanted not in (target, self._said):
            verb = "would scale" if self._settings.dry_run else "scales"
            logger.info("Autoscaling %s from %d to %d replicas: %s", verb, target, wanted, self._load)
        self._said = wanted
        return (target if self._settings.dry_run else wanted), {}

    def _ask(self, wanted: int) -> None:
        try:
            coordinator = ray.get_actor(self._name, namespace=self._namespace)
            self._question = coordinator.load.remote(wanted).future()
        except ValueError:
            self._load = None  # there is no coordinator now

    def _collect_answer(self) -> None:
        if self._question is None or not self._question.done():
            return
        try:
            self._load = self._question.result()
        except ray.exceptions.RayError as error:
            logger.warning("The coordinator does not answer autoscaling (%s): nothing changes.", error)
            self._load = None
        self._question = None


def serve_config(settings: Autoscaling, initial_replicas: int, coordinator: tuple[str, str]) -> AutoscalingConfig:
    """The same for Ray Serve."""
    kwargs = {"settings": settings.model_dump(), "coordinator": list(coordinator)}
    return AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        initial_replicas=min(max(initial_replicas, settings.min_replicas), settings.max_replicas),
        upscale_delay_s=settings.upscale_delay_seconds,
        downscale_delay_s=settings.downscale_delay_seconds,
        metrics_interval_s=METRICS_SECONDS,
        look_back_period_s=2 * METRICS_SECONDS,
        policy=AutoscalingPolicy(policy_function="deploy.autoscaling:BlockPolicy", policy_kwargs=kwargs),
    )
