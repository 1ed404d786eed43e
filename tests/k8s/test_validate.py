"""`trifleet k8s validate`: planted mistakes, each found on its line and said in a sentence."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.kubernetes.documents import Problem, read_documents
from deploy.kubernetes.schemas import vendored, with_defaults
from deploy.kubernetes.validate import validate
from deploy.kubernetes.workloads import quantity, selects
from tests.k8s.conftest import ROOT, rendered
from tests.k8s.tools import tool

TRIFLEET = str(Path(sys.executable).parent / "trifleet")


@dataclass(frozen=True)
class Mistake:
    """In `overlay`, the first line that matches `old` below one that matches `below` becomes `new`."""

    overlay: str
    below: str
    old: str
    new: str
    says: str
    """Part of the sentence."""
    at: str | None = None
    """A pattern of the line that is blamed, where that is another one than the changed one."""


def plant(mistake: Mistake) -> tuple[str, int]:
    """The manifests with the mistake in them, and the line that must be blamed."""
    lines = rendered(f"overlays/{mistake.overlay}").split("\n")
    start = next(number for number, line in enumerate(lines) if re.search(mistake.below, line))
    at = next(number for number in range(start, len(lines)) if re.search(mistake.old, lines[number]))
    changed = re.sub(mistake.old, mistake.new, lines[at])
    lines[at : at + 1] = changed.split("\n") if changed else []
    if mistake.at is not None:
        at = next(number for number in range(start, len(lines)) if re.search(mistake.at, lines[number]))
    return "\n".join(lines), at + 1


HEAD, WORKERS = "headGroupSpec:", "workerGroupSpecs:"
MISTAKES = {
    # The schemas.
    "unknown field": Mistake("cpu-demo", HEAD, "imagePullPolicy:", "imagePulPolicy:", "did you mean imagePullPolicy?"),
    "unknown field of a core kind": Mistake(
        "production", "kind: PodDisruptionBudget", "minAvailable:", "minAvail:", "spec.minAvail is not a field"
    ),
    "unknown field in metadata": Mistake(
        "cpu-demo", "kind: RayService", "^  annotations:", "  annotation:", "did you mean annotations?"
    ),
    "wrong type": Mistake(
        "cpu-demo", WORKERS, "maxReplicas: 2", "maxReplicas: two", 'maxReplicas is "two": it must be of type integer'
    ),
    "wrong type of a core kind": Mistake(
        "production", "kind: PriorityClass", "value: 100000", "value: high", 'value is "high"'
    ),
    "wrong choice": Mistake("production", "autoscalerOptions:", "version: v2", "version: v3", "choose one of v1, v2"),
    "missing field": Mistake("cpu-demo", WORKERS, "groupName: engines", "labels: {}", "groupName is missing",
                             at="labels: {}"),
    "field of an alert": Mistake("production", "kind: PrometheusRule", "  for: 2m", "  four: 2m", "did you mean for?"),
    "unknown kind": Mistake("cpu-demo", "kind: RayService", "kind: RayService", "kind: RayServise", "--crds"),
    "unknown version": Mistake(
        "cpu-demo", "apiVersion: ray.io", "ray.io/v1", "ray.io/v1alpha1", "no schema", at="kind: RayService"
    ),
    # YAML.
    "a key twice": Mistake("cpu-demo", HEAD, "( *)(imagePullPolicy: .*)", r"\1\2\n\1imagePullPolicy: Never", "twice",
                           at="imagePullPolicy: Never"),
    "not YAML": Mistake("cpu-demo", HEAD, "num-cpus:.*", 'num-cpus: "0', "not valid YAML", at="object-store-memory:"),
    # KubeRay's own rules.
    "upgrade type": Mistake("cpu-demo", "upgradeStrategy:", "type: NewCluster", "type: Rolling", "KubeRay refuses"),
    "labels as parameter": Mistake(
        "cpu-demo", HEAD, 'num-cpus: "0"', 'labels: "a=b"', "rayStartParams.labels of the head is refused"
    ),
    "restart policy": Mistake(
        "production", WORKERS, "( *)priorityClassName: trifleet", r"\1restartPolicy: Always", "wants Never"
    ),
    "redis password in parameters": Mistake(
        "production", HEAD, "( *)(num-cpus:.*)", r"\1\2\n\1redis-password: x", "use spec.rayClusterConfig.gcsFault",
        at="redis-password: x",
    ),
    "tokens without version": Mistake("cpu-demo", "kind: RayService", "rayVersion: 2.60.0", "rayVersion: 2.40.0",
                                      "tokens need Ray 2.52", at="authOptions:"),
    "Ray of another version": Mistake("cpu-demo", "kind: RayService", "rayVersion: 2.60.0", "rayVersion: 2.55.0",
                                      "rayVersion must be 2.60.0"),
    "long name": Mistake("cpu-demo", "kind: RayService", "^  name: trifleet", "  name: " + "x" * 48, "47 are the most"),
    "timeout": Mistake(
        "cpu-demo", "annotations:", "initializing-timeout: 60m", "initializing-timeout: soon", "write a duration"
    ),
    # Manifests that fit each other.
    "mismatched selector": Mistake(
        "production", "kind: PodDisruptionBudget", "component: engines", "component: engine", "selects no pod",
        at="selector:",
    ),
    "budget of Ray pods that may go": Mistake(
        "production", "kind: PodDisruptionBudget", "minAvailable: 1", "maxUnavailable: 1",
        "spec.maxUnavailable does not work for pods of a Ray cluster",
    ),
    "budget of Ray pods as a share": Mistake(
        "production", "kind: PodDisruptionBudget", "minAvailable: 1", "minAvailable: 50%",
        "spec.minAvailable is '50%', which does not work for pods of a Ray cluster",
    ),
    "mismatched selector of a stateful set": Mistake(
        "production", "kind: StatefulSet", "component: redis", "component: cache", "selects no pod", at="selector:"
    ),
    "monitor of a service that is not there": Mistake(
        "production", "kind: ServiceMonitor", "identifier: trifleet-head", "identifier: other-head", "selects no serv",
        at="selector:",
    ),
    "port of a monitor": Mistake(
        "production", "kind: PodMonitor", "port: as-metrics", "port: as-metric", "is 'as-metric', a port that none"
    ),
    "port of a network policy": Mistake(
        "production", "name: clients", "port: serve", "port: http", "is 'http', a port that none"
    ),
    "spread of other pods": Mistake(
        "production", "topologySpreadConstraints:", "component: engines", "component: head", "its own labels",
        at="labelSelector:",
    ),
    "missing limit": Mistake("cpu-demo", WORKERS, 'cpu: "2"', "nvidia.com/gpu: 1", "has no cpu limit", at="resources:"),
    "request above limit": Mistake(
        "cpu-demo", "requests:", "memory: 4Gi", "memory: 5Gi", "above its limit of 4Gi"
    ),
    "image without tag": Mistake("cpu-demo", HEAD, "image: trifleet:0.1.0-cpu", "image: trifleet", "is not pinned"),
    "latest image": Mistake("production", "kind: StatefulSet", "redis:7.4.2", "redis:latest", "is not pinned"),
    "no probe": Mistake("cpu-demo", WORKERS, "readinessProbe:", "startupProbe:", "has no readinessProbe",
                        at="- envFrom:"),
    "volume claim that is not there": Mistake(
        "gpu", WORKERS, "claimName: trifleet-models", "claimName: models", "names PersistentVolumeClaim models"
    ),
    "priority that is not there": Mistake(
        "production", HEAD, "priorityClassName: trifleet", "priorityClassName: high", "names PriorityClass high"
    ),
    "mount of no volume": Mistake("gpu", HEAD, "name: tmp", "name: temp", "mounts temp", at="- mountPath: /tmp"),
    "token not decided": Mistake(
        "cpu-demo", HEAD, "automountServiceAccountToken: false", "hostIPC: false", "automountServiceAccountToken",
        at="^ {8}spec:",
    ),
    "secret written out": Mistake(
        "production", "kind: StatefulSet", "valueFrom:", "value: hunter2\n          __: ", "__", at="__"
    ),
    # Agreement with the settings.
    "unknown setting": Mistake(
        "cpu-demo", "serveConfigV2:", "budget: 256", "budgett: 256", "compression.budgett is not a setting"
    ),
    "setting out of range": Mistake("cpu-demo", "serveConfigV2:", " replicas: 2", " replicas: 0", "replicas is 0"),
    "unknown field of Serve": Mistake(
        "cpu-demo", "serveConfigV2:", "route_prefix: /", "route_prefx: /", "did you mean route_prefix?"
    ),
    "wrong type for Serve": Mistake(
        "cpu-demo", "serveConfigV2:", "enable_access_log: false", "enable_access_log: maybe", "valid boolean"
    ),
    "port of the container": Mistake(
        "cpu-demo", HEAD, "containerPort: 8000", "containerPort: 8001", "must name containerPort 8000", at="ports:"
    ),
    "port of the config": Mistake(
        "cpu-demo", "http_options:", "port: 8000", "port: 9000", "listens on port 9000"
    ),
    "environment": Mistake(
        "cpu-demo", "kind: ConfigMap|RAY_SERVE", 'ROUTER_TIMEOUT_S: "610"', 'ROUTER_TIMEOUT_S: "5"',
        "is '5' in the head, but the settings need '610'", at="envFrom:",
    ),
    "too few pods": Mistake(
        "cpu-demo", WORKERS, "maxReplicas: 2", "maxReplicas: 1", "do not fit the worker pods, which hold 1",
        at="^ {8}replicas: 2",
    ),
    "no pod for successors": Mistake(
        "production", WORKERS, "maxReplicas: 9", "maxReplicas: 8", "room for the successors of a pod that drains",
        at="max_replicas: 8",
    ),
    "pods that nothing scales": Mistake(
        "cpu-demo", WORKERS, "maxReplicas: 2", "maxReplicas: 3", "set enableInTreeAutoscaling"
    ),
    "GPUs of a replica": Mistake(
        "gpu-tensor-parallel", "serveConfigV2:", "tensor_parallel_size: 2", "tensor_parallel_size: 4",
        "make them equal", at="gpus_per_replica:",
    ),
    "old cluster deleted too soon": Mistake(
        "production", "kind: RayService", "rayClusterDeletionDelaySeconds: 7500", "rayClusterDeletionDelaySeconds: 60",
        "drain for 7200 s",
    ),
    "hook too short": Mistake("production", "preStop:", '"7800"', '"60"', "waits 60 s", at="command:"),
    "grace too short": Mistake(
        "production", WORKERS, "GracePeriodSeconds: 8100", "GracePeriodSeconds: 600", "terminationGracePeriodSeconds"
    ),
    "model on no volume": Mistake(
        "gpu", WORKERS, "mountPath: /models", "mountPath: /model", "lies on no volume of worker", at="volumeMounts:"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found_on_its_line(name: str) -> None:
    mistake = MISTAKES[name]
    text, line = plant(mistake)
    _, problems = validate(text)
    assert [p for p in problems if mistake.says in p.sentence and p.line == line], (line, [str(p) for p in problems])


@pytest.mark.parametrize("name", ["unknown field", "wrong type", "mismatched selector", "missing limit"])
def test_the_command_fails_with_the_line(name: str) -> None:
    text, line = plant(MISTAKES[name])
    result = CliRunner().invoke(app, ["k8s", "validate", "-"], input=text)
    assert result.exit_code == 1
    assert f"line {line}: " in result.stderr


def test_the_pipe_of_the_documentation_is_clean(overlay: str) -> None:
    pipe = f"'{tool('kubectl')}' kustomize k8s/overlays/{overlay} | '{TRIFLEET}' k8s validate -"
    done = subprocess.run(pipe, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no mistake found" in done.stdout


def test_no_input_is_a_mistake() -> None:
    result = CliRunner().invoke(app, ["k8s", "validate", "-"], input="---\n")
    assert result.exit_code == 1
    assert "There is no manifest in the standard input." in result.stderr


def test_a_file_that_is_not_there_is_a_sentence() -> None:
    result = CliRunner().invoke(app, ["k8s", "validate", "nowhere.yaml"])
    assert (result.exit_code, result.stderr) == (1, "nowhere.yaml cannot be read: No such file or directory.\n")


def test_further_definitions_are_read_from_a_folder(tmp_path: Path) -> None:
    definition = """
kind: CustomResourceDefinition
spec:
  group: example.org
  names: {kind: Widget}
  versions:
    - name: v1
      served: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec: {type: object, required: [size], properties: {size: {type: integer, default: 3}, colour: {type: string}}}
"""  # noqa: E501
    manifest = "apiVersion: example.org/v1\nkind: Widget\nmetadata: {name: w}\nspec:\n  colour: red\n"
    tmp_path.joinpath("widget.yaml").write_text(definition)
    assert validate(manifest)[1][0].line == 2
    assert validate(manifest, tmp_path) == (1, [])
    assert [p.line for p in validate(manifest.replace("red", "1"), tmp_path)[1]] == [5]


def test_defaults_come_before_validation() -> None:
    """RayService requires a worker group's minReplicas and maxReplicas, and defaults them."""
    schema = vendored()["ray.io/v1", "RayService"]
    group = {"spec": {"rayClusterConfig": {"workerGroupSpecs": [{"groupName": "a"}]}}}
    filled = with_defaults(group, schema)["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert (filled["minReplicas"], filled["groupName"]) == (0, "a")
    text = "\n".join(line for line in rendered("overlays/gpu-tensor-parallel").split("\n") if "minReplicas" not in line)
    assert [p for p in validate(text)[1] if "is missing" in p.sentence] == []


def test_lines_are_those_of_the_text() -> None:
    text = "a: 1\nb:\n  - c: 2\n  -\n    d: {e: 3}\n---\nf: |\n  g: 1\n"
    (first, second), problems = read_documents(text)
    assert problems == []
    lines = {path: first.line(path) for path in [("a",), ("b", 0, "c"), ("b", 1), ("b", 1, "d", "e"), ("b", 7, "x")]}
    assert list(lines.values()) == [1, 3, 5, 5, 2]
    assert second.line(("f",)) == 7


def test_problems_are_in_the_order_of_lines() -> None:
    text = rendered("overlays/cpu-demo").replace("trifleet:0.1.0-cpu", "trifleet")
    found = [problem.line for problem in validate(text)[1]]
    assert len(found) == 2
    assert found == sorted(found)
    assert str(Problem(3, "x")) == "line 3: x"


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("4Gi", 4 * 2**30), ("2", 2), (8, 8), ("1.5", 1.5), ("many", None)]
)
def test_quantities(text: object, number: float | None) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize(
    ("operator", "values", "chosen"),
    [
        ("In", ["a"], True),
        ("In", ["b"], False),
        ("NotIn", ["b"], True),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
def test_selectors(operator: str, values: list[str], chosen: bool) -> None:
    expression = {"key": "k", "operator": operator, "values": values}
    assert selects({"matchExpressions": [expression]}, {"k": "a"}) is chosen
    assert selects({}, {})
