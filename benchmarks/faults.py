"""What `trifleet bench chaos` does to a fleet. Hits one process by its id, or one node of Ray; nothing else."""

import asyncio
import math
import os
import re
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.fleet import MARK, fleet_processes
from deploy.haproxy import free_ports
from deploy.settings import FleetSettings

NODE_REMOVED, DISK_FULL = "node_removed", "disk_full"

Family = Callable[[], list[psutil.Process]]
"""Every process of the fleet, now."""
Fault = Callable[[list[psutil.Process]], Awaitable[str]]
"""Strikes, given all processes of the fleet; ends what is meant to pass by itself. Tells what it hit."""


@dataclass(frozen=True)
class ProcessFault:
    """`pattern`: of the victim's command line; the newest one is hit."""

    pattern: str
    stopped_seconds: float | None = None
    """None: killed with SIGKILL. Otherwise stopped, and continued after that."""

    async def __call__(self, family: list[psutil.Process]) -> str:
        found = [process for process in family if re.search(self.pattern, title(process))]
        if not found:
            raise LookupError(f"no process of the fleet is named {self.pattern}")
        victim = max(found, key=lambda process: process.create_time())
        name = _program(victim)
        if self.stopped_seconds is None:
            victim.kill()
            return name
        victim.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(self.stopped_seconds)
        finally:
            victim.send_signal(signal.SIGCONT)
        return name


FAULTS = {
    "engine_killed": ProcessFault(r"^VLLM::EngineCore"),
    "replica_killed": ProcessFault(r"^ray::ServeReplica:trifleet:replica"),
    "coordinator_killed": ProcessFault(r"^ray::Coordinator"),
    "router_killed": ProcessFault(r"^ray::ServeReplica:trifleet:router"),
    "haproxy_killed": ProcessFault(r"^\S*/haproxy\b.* -f "),
    "haproxy_parent_killed": ProcessFault(r"^ray::HAProxyManager"),
    "replica_stopped": ProcessFault(r"^ray::ServeReplica:trifleet:replica", stopped_seconds=15.0),
    # Whatever is on its way to it arrives that much later.
    "reports_delayed": ProcessFault(r"^ray::Coordinator", stopped_seconds=5.0),
}
"""Those that need no fleet of their own."""


def two_nodes() -> tuple[Callable[[FleetSettings], None], Fault]:
    """A way to start Ray as two nodes on this machine, and the fault that takes away the one that is not the head.

    The head has room for all replicas: what is lost is started anew there.
    """
    nodes: list[Any] = []

    def start(settings: FleetSettings) -> None:
        # One machine, two HAProxies: the load goes to the head's.
        os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(*free_ports(1))
        import ray
        from ray.cluster_utils import Cluster

        common = {"include_dashboard": False, "object_store_memory": 128 * 1024 * 1024}
        cpus = math.ceil(settings.cpus_per_replica)
        cluster = Cluster(shutdown_at_exit=False)
        cluster.add_node(num_cpus=cpus * settings.replicas + 1, **common)
        nodes.extend((cluster, cluster.add_node(num_cpus=cpus, **common)))
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    async def removed(family: list[psutil.Process]) -> str:
        cluster, node = nodes
        raylet = node.all_processes["raylet"][0].process.pid
        lost = sorted(_program(process) for process in family if _is_of(raylet, process))
        if not any(name.startswith("ray::ServeReplica:trifleet:replica") for name in lost):
            raise LookupError(f"no replica runs on the node to be removed: {', '.join(lost)}")
        await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
        return ", ".join(lost)

    return start, removed


def family_here() -> list[psutil.Process]:
    """Every process of the fleet that this one has started, also one that lost its parent."""
    found = []
    for pid in fleet_processes(Path(os.environ[MARK])):
        try:
            found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def _is_of(raylet: int, process: psutil.Process) -> bool:
    """Whether it runs on the node of this raylet."""
    try:
        return process.environ().get("RAY_RAYLET_PID") == str(raylet)
    except psutil.Error:
        return False


def _program(process: psutil.Process) -> str:
    """The first word of its title, without a folder of this machine."""
    return Path(title(process).split(" ")[0]).name


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()  # a title that was set is padded
    except psutil.Error:
        return ""
