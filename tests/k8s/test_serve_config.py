"""A Ray cluster on this machine gets the rendered `serveConfigV2` and nothing else, as KubeRay would send it.

Real: Ray, Serve, HAProxy, two engines of the bundled model, `serve deploy`. Not real: the pods. So the environment
is the rendered ConfigMap's, with ports and files that other users of the machine do not have.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from deploy import haproxy
from deploy.fleet import MARK, answers, fleet_processes
from deploy.kubernetes import drain
from deploy.kubernetes.documents import read_documents
from deploy.kubernetes.workloads import pods
from tests.k8s.conftest import rendered

START_SECONDS = 240
# As KubeRay does for `authOptions.mode: token`: a token of its own in every container.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
DRAIN_SECONDS = 25
BIN = Path(sys.executable).parent


def manifests(kind: str) -> list[dict[str, Any]]:
    return [m for m in yaml.safe_load_all(rendered("overlays/cpu-demo")) if m["kind"] == kind]


@dataclass
class Cluster:
    folder: Path
    address: str
    dashboard: str
    agent: str
    url: str
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    (service,) = manifests("RayService")
    (variables,) = (m["data"] for m in manifests("ConfigMap") if "environment" in m["metadata"]["name"])
    config = service["spec"]["serveConfigV2"]
    port = yaml.safe_load(config)["http_options"]["port"]
    gcs, dashboard, agent, client = haproxy.free_ports(4)
    # Short, because sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="k8s-", dir="/tmp") as name:
        folder = Path(name)
        private = haproxy.private(folder, port)
        pages = [int(private[f"RAY_SERVE_HAPROXY_{page}_PORT"]) for page in ("STATS", "METRICS")]
        haproxy.write_wrapper(folder, [*pages, port])
        environment = {**os.environ, **variables, **private, **TOKEN, MARK: name}
        file = folder / "serve.yaml"
        file.write_text(config)
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", "--num-cpus=2", "--object-store-memory=134217728",
            f"--temp-dir={name}/ray",
        ]  # fmt: skip
        urls = [f"http://127.0.0.1:{number}" for number in (dashboard, agent, port)]
        running = Cluster(folder, f"127.0.0.1:{gcs}", *urls, environment)
        with (folder / "ray.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            await_(lambda: applications(running) is not None, "Ray's dashboard", folder / "ray.log")
            deployed = running.run(str(BIN / "serve"), "deploy", "-a", running.dashboard, str(file))
            assert deployed.returncode == 0, deployed.stdout + deployed.stderr
            await_(lambda: is_up(running), "the fleet", folder / "ray.log")
            yield running
        finally:
            # Not asked to stop: `ray start --block` takes 20 s and more for that, once its pod was drained.
            for pid in fleet_processes(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(20)


def applications(cluster: Cluster) -> dict[str, Any] | None:
    """What KubeRay asks the dashboard: the status of every application; None while there is no answer."""
    token = {"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"}
    with contextlib.suppress(httpx.HTTPError):
        answer = httpx.get(f"{cluster.dashboard}/api/serve/applications/", headers=token, timeout=5)
        if answer.status_code == 200:
            return {name: one["status"] for name, one in answer.json()["applications"].items()}
    return None


def is_up(cluster: Cluster) -> bool:
    return applications(cluster) == {"trifleet": "RUNNING"} and answers(cluster.url, replicas=2)


def cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def await_(condition: Any, what: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} is not up after {START_SECONDS} s:\n{log.read_text()}"
        time.sleep(0.5)


def test_a_chat_completion_is_answered(cluster: Cluster) -> None:
    answer = cluster.client().chat.completions.create(
        model="tiny-reasoner", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_requests_are_placed_by_the_coordinator_of_the_config(cluster: Cluster) -> None:
    cluster.client().completions.create(model="tiny-reasoner", prompt="1 2 3", max_tokens=4)
    fleet = httpx.get(f"{cluster.url}/fleet").json()
    assert fleet["admissions"] >= 1
    assert sum(reasons.get("without_coordinator", 0) for reasons in fleet["placements"].values()) == 0


def test_the_probes_of_the_pods_are_answered_without_the_token(cluster: Cluster) -> None:
    ports = {52365: cluster.agent, "dashboard": cluster.dashboard, "serve": cluster.url}
    probes = [
        container[kind]["httpGet"]
        for pod in pods(read_documents(rendered("overlays/cpu-demo"))[0])
        for _, container in pod.containers
        for kind in ("startupProbe", "livenessProbe", "readinessProbe")
    ]
    assert len(probes) == 6
    for probe in probes:
        assert httpx.get(ports[probe["port"]] + probe["path"], timeout=10).status_code == 200, probe


def test_a_changed_config_replaces_the_coordinator_and_the_same_one_does_not(cluster: Cluster) -> None:
    """What Serve does on a change of the file, without rolling two engines for it."""
    code = """
import ray, yaml
from deploy.app import fleet
from deploy.coordinator import NAME, NAMESPACE
from deploy.settings import FleetSettings
ray.init(log_to_driver=False)
(service,) = (m for m in yaml.safe_load_all(open({file!r})) if m["kind"] == "RayService")
(app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
def actor(): return ray.get_actor(NAME, namespace=NAMESPACE)._actor_id.hex()
first = actor()
fleet(FleetSettings.model_validate(app["args"]))
same = actor()
app["args"]["coordinator"]["queue_length"] = 7
fleet(FleetSettings.model_validate(app["args"]))
print(first == same, same == actor())
"""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(rendered("overlays/cpu-demo"))
        file.flush()
        done = cluster.run(sys.executable, "-c", code.format(file=file.name))
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr
    deadline = time.monotonic() + 20
    while not answers(cluster.url, replicas=2):
        assert time.monotonic() < deadline, "the replicas do not report to the new coordinator"
        time.sleep(0.2)


def test_a_pod_that_ends_lets_its_answers_end_first(cluster: Cluster) -> None:
    """Last here: it takes the only node's replicas away. HAProxy stays: this node is the head, which Serve never
    leaves without one, so the hook waits for its whole time."""
    tokens = 400
    stream = cluster.client().completions.create(
        model="tiny-reasoner", prompt="1 2 3", max_tokens=tokens, stream=True, extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )  # fmt: skip
    first = next(iter(stream))
    assert first.choices[0].finish_reason is None
    ended: list[Any] = []
    reader = threading.Thread(target=lambda: ended.extend(stream))
    reader.start()
    drained = cluster.run(
        sys.executable, "-m", "deploy.kubernetes.drain", "--seconds", str(DRAIN_SECONDS), timeout=DRAIN_SECONDS + 60
    )
    reader.join(60)
    assert ended[-1].usage.completion_tokens == tokens
    assert drained.returncode == 1, drained.stdout + drained.stderr
    titles = {title for pid in fleet_processes(cluster.folder) for title in drain.TITLES if title in cmdline(pid)}
    assert titles == {b"ray::HAProxyManager"}
