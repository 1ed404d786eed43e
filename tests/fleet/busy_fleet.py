"""Starts Serve with a replica that takes minutes to stop, in place of a fleet, and says "up"; stops it when it is told
to end, and says "stopped": `python -m tests.fleet.busy_fleet`."""

import asyncio
import contextlib
import signal

import deploy.fleet
from deploy.cli import LOCAL
from deploy.fleet import Progress, running_fleet
from deploy.haproxy import free_ports
from deploy.settings import FleetSettings, load_settings


def _start_busy(settings: FleetSettings, progress: Progress) -> None:
    # Here, because Ray Serve reads the fleet's environment when it is imported.
    from ray import serve

    @serve.deployment(graceful_shutdown_timeout_s=300, ray_actor_options={"num_cpus": 0})
    class Busy:
        async def __del__(self) -> None:
            await asyncio.sleep(600)

    serve.start(proxy_location="Disabled")
    serve.run(Busy.bind(), route_prefix=None)


if __name__ == "__main__":
    deploy.fleet._start_serve = _start_busy
    settings = load_settings(LOCAL)
    settings = settings.model_copy(update={"http": settings.http.model_copy(update={"port": free_ports(1)[0]})})
    with contextlib.suppress(KeyboardInterrupt), running_fleet(settings):
        print("up", flush=True)
        signal.pause()
    print("stopped")
