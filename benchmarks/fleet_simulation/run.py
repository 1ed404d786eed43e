"""One scenario under every router, on as many cores as are given, and its figures."""

import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from typing import Any

from benchmarks.fleet_simulation.report import compared, figures_of
from benchmarks.fleet_simulation.routers import WAYS, Way
from benchmarks.fleet_simulation.simulation import Simulation, tokens_per_second
from benchmarks.fleet_simulation.trace import Scenario, make_trace

CAPACITY_SEED = 1


def run_way(scenario: Scenario, replicas: int, requests: int, seed: int, way: Way) -> dict[str, Any]:
    """The trace is made anew, so that nothing large travels between processes."""
    full = tokens_per_second(replicas, scenario, CAPACITY_SEED)
    trace = make_trace(scenario, requests, full, seed)
    outcome = Simulation(trace, scenario, replicas, way, seed).run()
    return figures_of(outcome, trace, scenario) | {
        "tokens_per_second_when_full": round(full, 1),
        "arrival_seconds": round(float(trace.arrival[-1]), 1),
    }


def run_scenario(
    scenario: Scenario,
    replicas: int,
    requests: int,
    seed: int = 0,
    processes: int = 1,
    ways: Sequence[Way] = WAYS,
    on_done: Callable[[Way, dict[str, Any]], None] = lambda way, figures: None,
) -> dict[str, Any]:
    """Every router on the same arrivals. `processes` of them at a time."""
    began = time.perf_counter()
    done: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(run_way, scenario, replicas, requests, seed, way): way for way in ways}
        for future in as_completed(futures):
            way = futures[future]
            done[way.name] = future.result()
            on_done(way, done[way.name])
    ordered = {way.name: done[way.name] for way in ways}
    common = {name: ordered[ways[0].name][name] for name in ("tokens_per_second_when_full", "arrival_seconds")}
    for figures in ordered.values():
        for name in common:
            del figures[name]
    return {
        "replicas": replicas,
        "requests": requests,
        "seed": seed,
        **common,
        **compared(ordered, scenario),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "processes": processes,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "triattention-fleet")},
    }
