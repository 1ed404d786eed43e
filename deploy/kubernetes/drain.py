"""A worker pod's preStop hook: `python -m deploy.kubernetes.drain --seconds N` returns when the pod may go.

It tells Ray that this node is about to go. Serve then starts successors of its replicas where there is room, sends
them nothing more, and lets each end its requests, for `drain_seconds` of the settings at most. It also takes HAProxy
away, once nothing passes through it: what a client reads from another pod's replica may come by way of this pod.
Without the hook all of these would end within a second of the pod's deletion.
"""

import argparse
import logging
import os
import time
from pathlib import Path

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2

# What Ray calls the processes of Serve's replicas (the router is one too), and of who keeps HAProxy.
TITLES = (b"ray::ServeReplica:", b"ray::HAProxyManager")
POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


def drain(address: str, seconds: float) -> bool:
    """Drain this node of the cluster at `address`; whether nothing serves on it any more.

    Returns early where there is nothing to wait for: nothing that serves, or a Ray that does not drain it.
    """
    if not serves_here():
        return True
    deadline = time.time() + seconds
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    node = ray.get_runtime_context().get_node_id()
    accepted, reason = GcsClient(address=address).drain_node(
        node,
        autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
        "the pod is being deleted",
        int(deadline * 1000),
    )
    if not accepted:
        logger.warning("Ray does not drain this node (%s): its streams end now.", reason)
        return False
    while serves_here() and time.time() < deadline:
        time.sleep(POLL_SECONDS)
    return not serves_here()


def serves_here(processes: Path = Path("/proc")) -> bool:
    """Whether a replica of Serve, or HAProxy, runs among the processes of this pod."""
    for entry in processes.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "cmdline").read_bytes().startswith(TITLES):
                return True
        except OSError:
            continue
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Let what this pod serves come to its end.")
    parser.add_argument("--seconds", type=float, required=True, help="longest wait")
    seconds = parser.parse_args().seconds
    raise SystemExit(0 if drain(os.environ["RAY_ADDRESS"], seconds) else 1)


if __name__ == "__main__":
    main()
