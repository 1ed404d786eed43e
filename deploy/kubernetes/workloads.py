"""The pods that a set of manifests makes: their templates, the labels they will carry, their containers' ports."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy.kubernetes.documents import Document, Path

# Every pod has these beside its template's, by KubeRay's hand; the cluster's name has a random end.
HEAD_PATH: Path = ("spec", "rayClusterConfig", "headGroupSpec", "template")
GROUPS_PATH: Path = ("spec", "rayClusterConfig", "workerGroupSpecs")

_TEMPLATES: dict[str, Path] = {
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "Pod": (),
}
_QUANTITY = re.compile(r"^([0-9.]+)([A-Za-z]*)$")
_FACTORS = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip


@dataclass(frozen=True)
class Pod:
    """One pod template. `labels` None: a pod that KubeRay makes by itself, of which nothing more is known."""

    document: Document
    path: Path
    """Of the template in the document."""
    title: str
    labels: dict[str, str]
    template: dict[str, Any]
    is_ray: bool

    @property
    def spec(self) -> dict[str, Any]:
        spec = self.template.get("spec")
        return spec if isinstance(spec, dict) else {}

    @property
    def containers(self) -> list[tuple[Path, dict[str, Any]]]:
        """Containers and init containers, with their paths."""
        found = []
        for part in ("initContainers", "containers"):
            for index, container in enumerate(self.spec.get(part) or []):
                if isinstance(container, dict):
                    found.append(((*self.path, "spec", part, index), container))
        return found

    @property
    def ports(self) -> dict[str, int]:
        """Named ports of its containers."""
        return {
            port["name"]: port["containerPort"]
            for _, container in self.containers
            for port in container.get("ports") or []
            if "name" in port and "containerPort" in port
        }


def pods(documents: list[Document]) -> list[Pod]:
    return [pod for document in documents for pod in _pods_of(document)]


def _pods_of(document: Document) -> Iterator[Pod]:
    if document.kind == "RayService":
        yield from _ray_pods(document)
    elif document.kind in _TEMPLATES:
        path = _TEMPLATES[document.kind]
        template = document.at(path)
        if isinstance(template, dict):
            yield Pod(document, path, "the pod", _labels(template), template, is_ray=False)


def _ray_pods(document: Document) -> Iterator[Pod]:
    head = document.at(HEAD_PATH)
    if isinstance(head, dict):
        labels = {**_ray_labels("head", "headgroup"), **_labels(head)}
        yield Pod(document, HEAD_PATH, "the head", labels, head, is_ray=True)
    for index, group in enumerate(document.at(GROUPS_PATH) or []):
        template = group.get("template") if isinstance(group, dict) else None
        if isinstance(template, dict):
            name = str(group.get("groupName", index))
            labels = {**_ray_labels("worker", name), **_labels(template)}
            path = (*GROUPS_PATH, index, "template")
            yield Pod(document, path, f"worker group {name}", labels, template, is_ray=True)
    if document.at(("spec", "rayClusterConfig", "gcsFaultToleranceOptions")) is not None:
        # The job that clears a deleted cluster's state out of Redis.
        labels = _ray_labels("redis-cleanup", "headgroup")
        yield Pod(document, HEAD_PATH, "the Redis cleanup", labels, {}, is_ray=True)


def _ray_labels(node_type: str, group: str) -> dict[str, str]:
    return {
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": node_type,
        "ray.io/group": group,
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }


def _labels(template: dict[str, Any]) -> dict[str, str]:
    metadata = template.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    return dict(labels) if isinstance(labels, dict) else {}


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector (`matchLabels`, `matchExpressions`) takes these labels; an empty one takes all."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions") or []:
        key, values = expression.get("key"), expression.get("values") or []
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if not holds.get(expression.get("operator"), False):
            return False
    return True


def quantity(text: Any) -> float | None:
    """A Kubernetes quantity such as 500m or 4Gi as a number; None if it is none."""
    match = _QUANTITY.match(str(text))
    if match is None or match[2] not in _FACTORS:
        return None
    return float(match[1]) * _FACTORS[match[2]]
