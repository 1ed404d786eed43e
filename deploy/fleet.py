"""Starts a fleet on this machine and stops it so that no process is left."""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from deploy.keys import key_header
from deploy.settings import FleetSettings

# In the environment of every process of a fleet, so that what outlives Ray's own stop is found by its id.
MARK = "TRIFLEET_FOLDER"
# Ray's own switches: nothing is sent home, and engines are not niced below the processes that feed them.
# No record of single tasks: every capacity report is one, and Ray's control store would grow by each.
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_task_events_report_interval_ms": "0"}
STOP_DEADLINE_SECONDS = 20.0
GRACEFUL_STOP_SECONDS = 8.0
_ENDING = (signal.SIGINT, signal.SIGTERM)

Progress = Callable[[str], None]
"""Told each time a part begins to start or stop: one short phrase."""


class FleetError(RuntimeError):
    """The fleet does not start; the message is a sentence, with where to read more."""


@contextmanager
def running_fleet(
    settings: FleetSettings,
    progress: Progress = lambda part: None,
    start_ray: Callable[[FleetSettings], None] | None = None,
) -> Iterator[str]:
    """A fleet that serves; yields its endpoint. Stopped on leaving, also by an exception or Ctrl-C.

    `start_ray`: starts Ray on this machine otherwise than as one node.
    """
    from deploy import haproxy

    settings.access_on(settings.http.host)  # these two raise before anything is started
    key_header()
    _check_port(settings)
    folder = Path(tempfile.mkdtemp(prefix="trifleet-", dir="/tmp"))
    variables = {
        **RAY,
        **haproxy.environment(settings),
        **haproxy.private(folder, settings.http.port),
        MARK: str(folder),
    }
    with _environment(variables):
        try:
            progress("Ray")
            (start_ray or _start_ray)(settings)
            end_politely()  # Ray has put a handler of its own in place, which ends this process at once
            _start_serve(settings, progress)
            yield endpoint(settings)
        finally:
            progress("stopping")
            _stop(folder)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Ray and Serve read these when they are imported, and the fleet's processes inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def end_politely() -> None:
    """Let a signal to end raise KeyboardInterrupt, so that `running_fleet` stops what it has started. SIGINT too, where
    a shell started us in the background, which ignores it."""
    for number in _ENDING:
        signal.signal(number, signal.default_int_handler)


def endpoint(settings: FleetSettings) -> str:
    return f"http://{settings.http.host}:{settings.http.port}"


def answers(url: str, replicas: int = 1) -> bool:
    """Whether a fleet answers there now, with a state in which at least so many replicas can be sent to, or by asking
    for another key."""
    try:
        response = httpx.get(f"{url}/fleet", timeout=5, headers=key_header())
    except httpx.HTTPError:
        return False
    if response.status_code == 200:
        return sum(replica["reachable"] for replica in response.json()["replicas"]) >= replicas
    return response.status_code in (401, 403)


def _reachable() -> int:
    """Replicas to which requests can go, as the coordinator knows. Asked by way of Ray, which needs no key."""
    import ray

    from deploy.coordinator import NAME, NAMESPACE

    try:
        status = ray.get(ray.get_actor(NAME, namespace=NAMESPACE).status.remote(), timeout=5)
    except (ray.exceptions.RayError, ValueError):  # it starts, or has no name yet
        return 0
    return sum(replica["reachable"] for replica in json.loads(status)["replicas"])


def _start_ray(settings: FleetSettings) -> None:
    """Ray's node gives up when its agents take longer than 15 s to import, as on a busy machine: then once more."""
    import ray
    from ray._private import worker

    # Ray prints every worker's end on the driver's terminal and has no switch for it; its logs tell it too.
    worker.print_to_stdstream = lambda *_, **__: None
    for attempt in (1, 2):
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, int(settings.cpus_per_replica * settings.most_replicas) + 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=128 * 1024 * 1024,
            )
            return
        except Exception as error:  # a bare Exception is what Ray raises here
            ray.shutdown()
            if attempt == 2:
                raise FleetError(f"Ray did not start on this machine, tried twice: {error}") from None


def _start_serve(settings: FleetSettings, progress: Progress) -> None:
    from ray import serve

    from deploy.app import APP, fleet

    progress("HAProxy")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # this process's terminal; Serve logs to its files
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": settings.http.host, "port": settings.http.port},
        logging_config={"enable_access_log": False},
    )
    progress("Coordinator")
    serve.run_many([serve.RunTarget(fleet(settings), name=APP, route_prefix="/")], wait_for_applications_running=False)
    _await_running(settings, progress)


def _await_running(settings: FleetSettings, progress: Progress) -> None:
    import ray
    from ray import serve

    from deploy.app import APP, REPLICA

    deadline = time.monotonic() + settings.start_seconds
    while True:
        status = serve.status().applications[APP]
        replicas = status.deployments.get(REPLICA)
        running = replicas.replica_states.get("RUNNING", 0) if replicas else 0
        progress(f"engines, {running} of {settings.replicas} up")
        if status.status.value == "RUNNING" and answers(endpoint(settings)) and _reachable() >= settings.replicas:
            return
        failed = status.status.value == "DEPLOY_FAILED"
        if failed or time.monotonic() > deadline:
            messages = [deployment.message for deployment in status.deployments.values() if deployment.message]
            last = messages[0].strip().splitlines()[-1] if messages else ""
            reason = last or "Serve does not say why"
            if not failed:
                told = f", and Serve says: {last}" if last else ""
                reason = (
                    f"{running} of {settings.replicas} engines were up after start_seconds, "
                    f"{settings.start_seconds:g} s: raise it where the model takes longer to fetch and to load{told}"
                )
            logs = ray._private.worker._global_node.get_logs_dir_path()
            raise FleetError(f"The fleet did not start: {reason} (logs: {logs})")
        time.sleep(0.5)


def _check_port(settings: FleetSettings) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.http.host, settings.http.port))
        except OSError as error:
            address = f"Port {settings.http.port} on {settings.http.host}"
            if error.errno == errno.EADDRINUSE:
                raise FleetError(f"{address} is in use: stop what listens there, or set http.port.") from None
            reason = f"cannot be listened on ({error.strerror})"
            raise FleetError(f"{address} {reason}: set http.host to an IPv4 address of this machine.") from None


def _stop(folder: Path) -> None:
    """Serve, Ray, then by id whatever of this fleet is still there. Safe after a start that failed half way."""
    import ray

    # A second Ctrl-C or polite kill must not leave half a fleet behind.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        if ray.is_initialized():
            _shut_down_serve()
            ray.shutdown()
        _end_leftovers(folder)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _shut_down_serve() -> None:
    """As `serve.shutdown`, but patient for so long only: Serve waits for what still runs, which may take hours. That is
    for a replica that goes while the fleet stays; here the fleet goes. No thread may wait instead: Ray ends the process
    where one asks it for something after `ray.shutdown`."""
    from ray.serve import context

    client, _ = context._check_cached_client_alive()  # None where Serve never started or is gone
    if client is not None:
        with contextlib.suppress(Exception):  # what does not stop is ended by its id
            client.shutdown(timeout_s=GRACEFUL_STOP_SECONDS)
    context._disconnect()


def _end_leftovers(folder: Path) -> None:
    deadline = time.monotonic() + STOP_DEADLINE_SECONDS
    sent: signal.Signals = signal.SIGTERM
    while members := fleet_processes(folder):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        if time.monotonic() > deadline:
            raise FleetError(f"Processes of the fleet do not end: {members}.")
        time.sleep(0.5)
        sent = signal.SIGKILL


def fleet_processes(folder: Path) -> list[int]:
    """Ids of living processes that carry this fleet's mark."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
