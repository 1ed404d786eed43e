"""What KubeRay's operator refuses although its definitions allow it.

After `ray-operator/controllers/ray/utils/validation.go` of KubeRay 1.7. A RayService that breaks one of these is
accepted by the API server and then never becomes a cluster: the reason is an event that few people look for.
"""

import re
from collections.abc import Iterator
from typing import Any

from deploy.kubernetes.documents import Document, Path, Problem, dotted
from deploy.kubernetes.workloads import GROUPS_PATH, HEAD_PATH

LONGEST_NAME = 47
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
TIMEOUT = "ray.io/initializing-timeout"
FT_ENABLED, STORAGE_NAMESPACE = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
FIRST_RAY_WITH_TOKENS = (2, 52)

_CLUSTER: Path = ("spec", "rayClusterConfig")
_DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_DURATION = re.compile(r"^([0-9]*\.?[0-9]+(ns|us|µs|ms|s|m|h))+$|^[0-9]+$")
_LABEL_KEY = re.compile(r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?$")
_LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?$")
_RESOURCE_PARAMETERS = ("num-cpus", "num-gpus", "memory", "resources")


def refused(document: Document) -> Iterator[Problem]:
    """What the operator would refuse of a RayService."""
    yield from _metadata(document)
    yield from _service(document)
    for path, title in _groups(document):
        yield from _group(document, path, title)
    yield from _fault_tolerance(document)
    yield from _autoscaling(document)
    yield from _tokens(document)


def _metadata(document: Document) -> Iterator[Problem]:
    path: Path = ("metadata", "name")
    if len(document.name) > LONGEST_NAME:
        yield document.problem(
            path,
            f"its name has {len(document.name)} characters, and KubeRay makes longer names of it: "
            f"{LONGEST_NAME} are the most.",
        )
    if not _DNS_LABEL.match(document.name):
        yield document.problem(
            path, f"its name is {document.name!r}: use lower-case letters, digits and dashes, and begin with a letter."
        )
    timeout = document.at(("metadata", "annotations", TIMEOUT))
    if timeout and (not _DURATION.match(str(timeout)) or not re.search("[1-9]", str(timeout))):
        yield document.problem(
            ("metadata", "annotations", TIMEOUT), f"{TIMEOUT} is {timeout!r}: write a duration such as 30m, or seconds."
        )


def _service(document: Document) -> Iterator[Problem]:
    kind = document.at(("spec", "upgradeStrategy", "type"))
    if kind is not None and kind not in UPGRADES:
        yield document.problem(
            ("spec", "upgradeStrategy", "type"),
            f"spec.upgradeStrategy.type is {kind!r}, which KubeRay refuses: choose one of {', '.join(UPGRADES)}.",
        )
    if kind == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(document)
    delay = document.at(("spec", "rayClusterDeletionDelaySeconds"))
    if isinstance(delay, int) and delay < 0:
        yield document.problem(
            ("spec", "rayClusterDeletionDelaySeconds"),
            f"spec.rayClusterDeletionDelaySeconds is {delay}: it must not be negative.",
        )
    for path in (("spec", "managedBy"), (*_CLUSTER, "managedBy")):
        manager = document.at(path)
        if manager is not None and manager not in MANAGERS:
            yield document.problem(path, f"{dotted(path)} is {manager!r}: choose one of {', '.join(MANAGERS)}.")
    name: Path = (*_CLUSTER, "headGroupSpec", "headService", "metadata", "name")
    if document.at(name):
        yield document.problem(name, f"{dotted(name)} must not be set: KubeRay names the head's service itself.")
    if document.at((*_CLUSTER, "upgradeStrategy")) is not None:
        path = (*_CLUSTER, "upgradeStrategy")
        yield document.problem(path, f"{dotted(path)} is for a RayCluster alone: use spec.upgradeStrategy.")


def _incremental(document: Document) -> Iterator[Problem]:
    if not document.at((*_CLUSTER, "enableInTreeAutoscaling")):
        yield document.problem(
            ("spec", "upgradeStrategy", "type"),
            "NewClusterWithIncrementalUpgrade needs Ray's autoscaler: set enableInTreeAutoscaling.",
        )
    options: Path = ("spec", "upgradeStrategy", "clusterUpgradeOptions")
    if document.at(options) is None:
        yield document.problem(
            ("spec", "upgradeStrategy"), f"{dotted(options)} is missing: NewClusterWithIncrementalUpgrade needs it."
        )
        return
    for name in ("maxSurgePercent", "stepSizePercent"):
        value = document.at((*options, name))
        if isinstance(value, int) and not 0 <= value <= 100:
            yield document.problem((*options, name), f"{name} is {value}: it must be from 0 to 100.")
    interval = document.at((*options, "intervalSeconds"))
    if isinstance(interval, int) and interval <= 0:
        yield document.problem((*options, "intervalSeconds"), f"intervalSeconds is {interval}: it must be above 0.")


def _groups(document: Document) -> Iterator[tuple[Path, str]]:
    yield HEAD_PATH[:-1], "the head"
    for index, group in enumerate(document.at(GROUPS_PATH) or []):
        if isinstance(group, dict):
            yield (*GROUPS_PATH, index), f"worker group {group.get('groupName', index)}"


def _group(document: Document, path: Path, title: str) -> Iterator[Problem]:
    if not document.at((*path, "template", "spec", "containers")):
        yield document.problem(path, f"{title} has no container: it needs one, for Ray.")
    parameters = document.at((*path, "rayStartParams")) or {}
    if "labels" in parameters:
        yield document.problem(
            (*path, "rayStartParams", "labels"),
            f"rayStartParams.labels of {title} is refused by KubeRay: use {dotted((*path, 'labels'))}.",
        )
    both = [name for name in _RESOURCE_PARAMETERS if parameters.get(name)]
    if both and document.at((*path, "resources")):
        yield document.problem(
            (*path, "resources"),
            f"{title} sets resources as well as rayStartParams.{both[0]}: KubeRay takes only one of them.",
        )
    for key, value in (document.at((*path, "labels")) or {}).items():
        if not _LABEL_KEY.match(str(key)) or not _LABEL_VALUE.match(str(value)):
            yield document.problem(
                (*path, "labels", key), f"label {key}: {value} of {title} is not a Kubernetes label."
            )
    if document.at((*path, "suspend")):
        yield document.problem((*path, "suspend"), f"{title} cannot be suspended in a RayService: remove suspend.")


def _head_environment(document: Document) -> dict[str, tuple[Path, Any]]:
    path: Path = (*HEAD_PATH, "spec", "containers", 0, "env")
    entries = document.at(path) or []
    return {
        entry["name"]: ((*path, index), entry.get("value"))
        for index, entry in enumerate(entries)
        if isinstance(entry, dict) and "name" in entry
    }


def _fault_tolerance(document: Document) -> Iterator[Problem]:
    options: Path = (*_CLUSTER, "gcsFaultToleranceOptions")
    environment = _head_environment(document)
    parameters: Path = (*HEAD_PATH[:-1], "rayStartParams")
    remedy = f"use {dotted(options)}."
    refused_always: dict[Path, str] = {(*parameters, "redis-username"): "rayStartParams.redis-username"}
    refused_beside: dict[Path, str] = {
        (*parameters, "redis-password"): "rayStartParams.redis-password",
        ("metadata", "annotations", STORAGE_NAMESPACE): STORAGE_NAMESPACE,
        ("metadata", "annotations", FT_ENABLED): FT_ENABLED,
    }
    for name in ("REDIS_USERNAME", "RAY_REDIS_ADDRESS"):
        if name in environment:
            refused_always[environment[name][0]] = f"the head's variable {name}"
    if "REDIS_PASSWORD" in environment:
        refused_beside[environment["REDIS_PASSWORD"][0]] = "the head's variable REDIS_PASSWORD"
    if document.at(options) is not None:
        refused_always |= refused_beside
    for path, what in refused_always.items():
        if document.at(path):
            yield document.problem(path, f"{what} is refused by KubeRay: {remedy}")


def _autoscaling(document: Document) -> Iterator[Problem]:
    is_on = bool(document.at((*_CLUSTER, "enableInTreeAutoscaling")))
    version = document.at((*_CLUSTER, "autoscalerOptions", "version"))
    name = "RAY_enable_autoscaler_v2"
    path, value = _head_environment(document).get(name, ((), None))
    if value is not None and not is_on and str(value) in ("1", "true"):
        yield document.problem(path, f"the head's variable {name} needs enableInTreeAutoscaling: set that.")
    if value is not None and is_on and version is not None:
        yield document.problem(
            path, f"the head's variable {name} and autoscalerOptions.version are both set: keep one."
        )
    if is_on and (version == "v2" or str(value) in ("1", "true")):
        for group, title in _groups(document):
            where: Path = (*group, "template", "spec", "restartPolicy")
            policy = document.at(where)
            if policy not in (None, "", "Never"):
                yield document.problem(
                    where, f"restartPolicy of {title} is {policy}: autoscaler v2 wants Never, or none at all."
                )


def _tokens(document: Document) -> Iterator[Problem]:
    path: Path = (*_CLUSTER, "authOptions")
    if document.at((*path, "enableK8sTokenAuth")):
        yield document.problem(
            (*path, "enableK8sTokenAuth"), "enableK8sTokenAuth is refused for a RayService: use authOptions.mode token."
        )
    if document.at(path) is None or document.at((*path, "mode")) == "disabled":
        return
    version = document.at((*_CLUSTER, "rayVersion"))
    found = re.match(r"(\d+)\.(\d+)", str(version or ""))
    if found is None or (int(found[1]), int(found[2])) < FIRST_RAY_WITH_TOKENS:
        yield document.problem(path, f"rayVersion is {version}, but tokens need Ray 2.52 or later: set rayVersion.")
