"""Which replicas HAProxy can send a request to now, asked of the running process through Ray's admin socket.

Serve lists a replica some time before HAProxy has read it from a new configuration (right after a start, and when the
fleet grows): a request for it would be sent by HAProxy's own choice, without the headers of its reservation.
"""

import asyncio
from pathlib import Path

from ray.serve._private.constants import RAY_SERVE_HAPROXY_SOCKET_PATH
from ray.serve._private.haproxy import HAProxyManager

# The backend of requests for which the router named the replica.
PINNED_BACKEND_SUFFIX = "-via-ingress-request-router"
RUNNING = "2"
ANSWER_SECONDS = 2.0


def admin_socket(node: str) -> Path:
    """Where the HAProxy of this Ray node listens, as `HAProxyManager` places it."""
    path = Path(RAY_SERVE_HAPROXY_SOCKET_PATH)
    return path.parent / node / path.name


async def reachable(socket: Path, replicas: frozenset[str]) -> frozenset[str]:
    """Those of `replicas`, full ids, that HAProxy knows and takes for up.

    Raises OSError or TimeoutError where HAProxy does not answer, as while it starts.
    """
    up = servers_up(await _ask(socket, "show servers state"))
    return frozenset(replica for replica in replicas if HAProxyManager.get_safe_name(replica) in up)


def servers_up(state: str) -> frozenset[str]:
    """The running servers of the pinned backends in HAProxy's `show servers state`, by name.

    Lines of: backend id, backend, server id, server, address, operational state, and more.
    """
    rows = [line.split() for line in state.splitlines() if not line.startswith("#")]
    return frozenset(
        row[3] for row in rows if len(row) > 5 and row[1].endswith(PINNED_BACKEND_SUFFIX) and row[5] == RUNNING
    )


async def _ask(socket: Path, command: str) -> str:
    async with asyncio.timeout(ANSWER_SECONDS):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            writer.write(f"{command}\n".encode())
            return (await reader.read()).decode()
        finally:
            writer.close()
