"""Rules that no schema has: manifests that fit each other, and pods that behave as guests should.

Limits, pinned images, probes; selectors that select something, port names that exist, references that lead
somewhere. Knows Kubernetes and KubeRay, and nothing of the fleet's settings.
"""

import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from deploy.kubernetes.documents import Document, Path, Problem, dotted, walk
from deploy.kubernetes.workloads import Pod, quantity, selects

_LIMITED = ("cpu", "memory")
_SECRET_NAME = re.compile(r"(PASSWORD|TOKEN|SECRET|API_KEY)$")
_Service = tuple[dict[str, str], set[str]]
"""Labels and port names."""


def inconsistent(documents: list[Document], pods: list[Pod]) -> Iterator[Problem]:
    for pod in pods:
        yield from _pod(pod)
        yield from _references(pod, documents)
        yield from _spread(pod)
    for document in documents:
        yield from _plain_secrets(document)
        if pods:
            yield from _selectors(document, documents, pods)


def _pod(pod: Pod) -> Iterator[Problem]:
    problem = pod.document.problem
    for path, container in pod.containers:
        title = f"container {container.get('name')} of {pod.title}"
        yield from _image(pod, path, title, str(container.get("image", "")))
        yield from _resources(pod, path, title, container.get("resources") or {})
        if "containers" in path:
            for probe in ("readinessProbe", "livenessProbe"):
                if probe not in container:
                    yield problem(path, f"{title} has no {probe}: add one.")
    if pod.spec and "automountServiceAccountToken" not in pod.spec:
        yield problem(
            (*pod.path, "spec"),
            f"{pod.title} does not say automountServiceAccountToken: say false, or true if it asks the Kubernetes API.",
        )


def _image(pod: Pod, path: Path, title: str, image: str) -> Iterator[Problem]:
    if "@sha256:" in image:
        return
    _, _, tag = image.rpartition("/")[2].partition(":")
    if tag in ("", "latest"):
        yield pod.document.problem(
            (*path, "image"), f"image {image!r} of {title} is not pinned: name a tag or a digest."
        )


def _resources(pod: Pod, path: Path, title: str, resources: dict[str, Any]) -> Iterator[Problem]:
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    where: Path = (*path, "resources")
    for name in _LIMITED:
        for kind, values in (("request", requests), ("limit", limits)):
            if name not in values:
                yield pod.document.problem(where, f"{title} has no {name} {kind}: set resources.{kind}s.{name}.")
    for name in requests.keys() & limits.keys():
        request, limit = quantity(requests[name]), quantity(limits[name])
        if request is not None and limit is not None and request > limit:
            yield pod.document.problem(
                (*where, "requests", name),
                f"{title} requests {requests[name]} of {name}, above its limit of {limits[name]}: raise the limit.",
            )


def _references(pod: Pod, documents: list[Document]) -> Iterator[Problem]:
    """ConfigMaps, volume claims, priority classes and accounts are made here. Secrets are made by hand."""
    names = {(document.kind, document.name) for document in documents}
    named: list[tuple[Path, str, Any]] = [
        (("spec", "priorityClassName"), "PriorityClass", pod.spec.get("priorityClassName")),
        (("spec", "serviceAccountName"), "ServiceAccount", pod.spec.get("serviceAccountName")),
    ]
    for path, value in walk(pod.template):
        if path and path[-1] in ("configMapRef", "configMapKeyRef", "configMap") and isinstance(value, dict):
            named.append(((*path, "name"), "ConfigMap", value.get("name")))
        elif path and path[-1] == "claimName":
            named.append((path, "PersistentVolumeClaim", value))
    for path, kind, name in named:
        if name is not None and (kind, name) not in names:
            yield pod.document.problem(
                (*pod.path, *path), f"{pod.title} names {kind} {name}, which is not here: add it."
            )
    volumes = {volume.get("name") for volume in pod.spec.get("volumes") or []}
    volumes |= {claim["metadata"]["name"] for claim in pod.document.at(("spec", "volumeClaimTemplates")) or []}
    for path, container in pod.containers:
        for index, mount in enumerate(container.get("volumeMounts") or []):
            if mount.get("name") not in volumes:
                yield pod.document.problem(
                    (*path, "volumeMounts", index), f"{pod.title} mounts {mount.get('name')}, which is no volume of it."
                )


def _plain_secrets(document: Document) -> Iterator[Problem]:
    if document.kind == "Secret" and (document.at(("data",)) or document.at(("stringData",))):
        yield document.problem(
            ("kind",), "a secret's value stands in a manifest: make the secret with kubectl instead."
        )
    for path, value in walk(document.values):
        if isinstance(value, dict) and _SECRET_NAME.search(str(value.get("name", ""))) and value.get("value"):
            yield document.problem(path, f"{value['name']} is written out: take it from a secret, with secretKeyRef.")


def _spread(pod: Pod) -> Iterator[Problem]:
    for index, constraint in enumerate(pod.spec.get("topologySpreadConstraints") or []):
        if not selects(constraint.get("labelSelector") or {}, pod.labels):
            yield pod.document.problem(
                (*pod.path, "spec", "topologySpreadConstraints", index, "labelSelector"),
                f"a spread constraint of {pod.title} does not select its own labels: correct its labelSelector.",
            )


def _selectors(document: Document, documents: list[Document], pods: list[Pod]) -> Iterator[Problem]:
    match document.kind:
        case "Service":
            selector = {"matchLabels": document.at(("spec", "selector")) or {}}
            chosen = yield from _chosen(document, ("spec", "selector"), selector, pods)
            for index, port in enumerate(document.at(("spec", "ports")) or []):
                yield from _port(document, ("spec", "ports", index, "targetPort"), port.get("targetPort"), chosen)
        case "Deployment" | "StatefulSet" | "DaemonSet":
            own = [pod for pod in pods if pod.document is document]
            yield from _chosen(document, ("spec", "selector"), document.at(("spec", "selector")) or {}, own)
        case "PodDisruptionBudget":
            chosen = yield from _chosen(document, ("spec", "selector"), document.at(("spec", "selector")) or {}, pods)
            yield from _budget(document, chosen)
        case "PodMonitor":
            chosen = yield from _chosen(document, ("spec", "selector"), document.at(("spec", "selector")) or {}, pods)
            for index, endpoint in enumerate(document.at(("spec", "podMetricsEndpoints")) or []):
                yield from _port(document, ("spec", "podMetricsEndpoints", index, "port"), endpoint.get("port"), chosen)
        case "ServiceMonitor":
            yield from _service_monitor(document, documents, pods)
        case "NetworkPolicy":
            yield from _network_policy(document, pods)


def _chosen(
    document: Document, path: Path, selector: dict[str, Any], pods: list[Pod]
) -> Generator[Problem, None, list[Pod]]:
    """The pods that a selector takes, as the generator's value; a problem if there are none."""
    chosen = [pod for pod in pods if selects(selector, pod.labels)]
    if not chosen:
        yield document.problem(path, f"{dotted(path)} selects no pod that is here: compare it with the pods' labels.")
    return chosen


def _port(document: Document, path: Path, port: Any, pods: list[Pod]) -> Iterator[Problem]:
    if isinstance(port, str) and pods and not any(port in pod.ports for pod in pods):
        known = ", ".join(sorted({name for pod in pods for name in pod.ports}))
        yield document.problem(
            path, f"{dotted(path)} is {port!r}, a port that none of its pods has: they have {known}."
        )


def _budget(document: Document, pods: list[Pod]) -> Iterator[Problem]:
    """Kubernetes counts `maxUnavailable`, and a share, from how many pods their owner wants, which its `scale` says.

    A RayCluster has no such subresource: the budget would allow nothing, and every drain would hang.
    """
    if not any(pod.is_ray for pod in pods):
        return
    remedy = "and a drain would wait for ever: set spec.minAvailable to a number of pods."
    most: Path = ("spec", "maxUnavailable")
    if document.at(most) is not None:
        yield document.problem(most, f"spec.maxUnavailable does not work for pods of a Ray cluster, {remedy}")
    least: Path = ("spec", "minAvailable")
    value = document.at(least)
    if isinstance(value, str):
        yield document.problem(
            least, f"spec.minAvailable is {value!r}, which does not work for pods of a Ray cluster, {remedy}"
        )


def _service_monitor(document: Document, documents: list[Document], pods: list[Pod]) -> Iterator[Problem]:
    selector = document.at(("spec", "selector")) or {}
    services = [*_own_services(documents), *_kuberay_services(pods)]
    ports = [names for labels, names in services if selects(selector, labels)]
    if not ports:
        yield document.problem(
            ("spec", "selector"), "spec.selector selects no service that is here or that KubeRay makes: correct it."
        )
    for index, endpoint in enumerate(document.at(("spec", "endpoints")) or []):
        name = endpoint.get("port")
        if ports and name is not None and not any(name in names for names in ports):
            known = ", ".join(sorted(set().union(*ports)))
            yield document.problem(
                ("spec", "endpoints", index, "port"),
                f"spec.endpoints[{index}].port is {name!r}, a port that its service lacks: it has {known}.",
            )


def _own_services(documents: Iterable[Document]) -> Iterator[_Service]:
    for document in documents:
        if document.kind == "Service":
            ports = {port.get("name") for port in document.at(("spec", "ports")) or []}
            yield document.at(("metadata", "labels")) or {}, ports


def _kuberay_services(pods: Iterable[Pod]) -> Iterator[_Service]:
    """The two services of a RayService: every port of the head's container, and `serve` of every pod that serves.

    Labels as in KubeRay's `controllers/ray/common/service.go`.
    """
    for pod in pods:
        if not pod.is_ray or pod.labels["ray.io/node-type"] != "head":
            continue
        name = pod.document.name
        origin = {"ray.io/originated-from-cr-name": name, "ray.io/originated-from-crd": "RayService"}
        head = {**origin, "ray.io/node-type": "head", "ray.io/identifier": f"{name}-head"}
        yield head, {*pod.ports, "metrics"}
        yield {**origin, "ray.io/serve": f"{name}-serve"}, {"serve"}


def _network_policy(document: Document, pods: list[Pod]) -> Iterator[Problem]:
    path: Path = ("spec", "podSelector")
    chosen = yield from _chosen(document, path, document.at(path) or {}, pods)
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(document.at(("spec", direction)) or []):
            where: Path = ("spec", direction, index)
            targets = chosen if direction == "ingress" else []
            for number, peer in enumerate(rule.get(peers) or []):
                # With a namespaceSelector the peer is somewhere else.
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    inner: Path = (*where, peers, number, "podSelector")
                    found = yield from _chosen(document, inner, peer["podSelector"], pods)
                    if direction == "egress":
                        targets = [*targets, *found]
            for number, port in enumerate(rule.get("ports") or []):
                yield from _port(document, (*where, "ports", number, "port"), port.get("port"), targets)
