"""A RayService that runs the fleet agrees with the settings it carries.

Owns the reading of `serveConfigV2`, by Ray Serve's own schema and by ours, and what must follow from the settings
elsewhere in the manifests: the environment, ports, pods large enough, time enough to drain, the model's volume.
"""

import difflib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from deploy.kubernetes.documents import Document, Path, Problem, dotted, read_documents
from deploy.kubernetes.render import BUILDER, environment
from deploy.kubernetes.workloads import GROUPS_PATH, Pod, quantity
from deploy.settings import FleetSettings, SettingsError, parse_settings

CONFIG: Path = ("spec", "serveConfigV2")
GPU = "nvidia.com/gpu"
RAY = "2.60.0"
# Beyond `drain_seconds`: Serve notices, and lets every replica drain for half a minute at least.
DRAIN_MARGIN_SECONDS = 60
# Between the end of the preStop hook and the pod's: Ray stops.
STOP_MARGIN_SECONDS = 30


def disagreements(document: Document, documents: list[Document], pods: list[Pod]) -> Iterator[Problem]:
    """For one RayService; nothing to say where its Serve config runs another application."""
    text = document.at(CONFIG)
    if not isinstance(text, str):
        yield document.problem(("spec",), "spec.serveConfigV2 is missing: `trifleet k8s render` writes it.")
        return
    # A block text begins on the line below its key.
    found, problems = read_documents(text, first_line=document.line(CONFIG) + 1)
    yield from problems
    if len(found) != 1:
        return
    (config,) = found
    yield from _serve_schema(document, config)
    for index, application in enumerate(config.at(("applications",)) or []):
        if not isinstance(application, dict) or application.get("import_path") != BUILDER:
            continue
        path: Path = ("applications", index, "args")
        try:
            settings = parse_settings(application.get("args") or {}, f"{document.title}: serveConfigV2")
        except SettingsError as error:
            for sentence in str(error).splitlines():
                yield Problem(_line_of(config, path, sentence), f"{sentence}.")
            continue
        own = [pod for pod in pods if pod.document is document and pod.template]
        yield from _ports(document, config, settings, own)
        yield from _environment(document, documents, settings, own)
        yield from _sizes(document, config, path, settings, own)
        yield from _drain(document, settings, own)
        yield from _model(document, settings, own)
    if document.at(("spec", "rayClusterConfig", "rayVersion")) != RAY:
        yield document.problem(
            ("spec", "rayClusterConfig", "rayVersion"), f"rayVersion must be {RAY}, the version in the image."
        )


def _serve_schema(document: Document, config: Document) -> Iterator[Problem]:
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(config.values)
    except ValidationError as error:
        for one in error.errors():
            path = cast(Path, tuple(one["loc"]))
            where = f"{dotted(path)}: " if path else ""
            yield Problem(config.line(path), f"{document.title}: serveConfigV2: {where}{one['msg']}.")
    for path, names in _unknown_fields(config.values, ServeDeploySchema):
        close = difflib.get_close_matches(str(path[-1]), names, n=1)
        remedy = f"did you mean {close[0]}?" if close else "remove it, or correct its name."
        yield Problem(
            config.line(path), f"{document.title}: serveConfigV2: {dotted(path)} is not a field of Ray Serve: {remedy}"
        )


def _unknown_fields(values: Any, model: type[BaseModel], path: Path = ()) -> Iterator[tuple[Path, list[str]]]:
    """Fields that Serve would ignore, with the names known there: its schema lets unknown ones pass."""
    if isinstance(values, list):
        for index, item in enumerate(values):
            yield from _unknown_fields(item, model, (*path, index))
    elif isinstance(values, dict):
        for name, value in values.items():
            if name not in model.model_fields:
                yield (*path, name), sorted(model.model_fields)
            elif (inner := _model_of(model.model_fields[name].annotation)) is not None:
                yield from _unknown_fields(value, inner, (*path, name))


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `list[Model]` or `Model | None`; None if it takes any mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_model_of(argument) for argument in get_args(annotation) if argument is not type(None)]
    return inner[0] if len(inner) == 1 else None


def _line_of(config: Document, args: Path, sentence: str) -> int:
    """The line of the setting that a sentence of `parse_settings` begins with."""
    name = sentence.split(": ", 2)[2].split()[0].rstrip(":") if sentence.count(": ") >= 2 else ""
    return config.line((*args, *name.split(".")))


def _ports(document: Document, config: Document, settings: FleetSettings, pods: list[Pod]) -> Iterator[Problem]:
    port = config.at(("http_options", "port")) or 8000
    if port != settings.http.port:
        yield Problem(
            config.line(("http_options", "port")),
            f"{document.title}: serveConfigV2 listens on port {port}, and http.port of the settings is "
            f"{settings.http.port}: render it anew.",
        )
    if config.at(("http_options", "host")) != "0.0.0.0":
        yield Problem(
            config.line(("http_options",)),
            f"{document.title}: http_options.host of serveConfigV2 must be 0.0.0.0, or no service reaches the pods.",
        )
    for pod in pods:
        if pod.ports.get("serve") != port:
            yield document.problem(
                (*pod.path, "spec", "containers", 0, "ports"),
                f"{pod.title} must name containerPort {port} `serve`: it has {pod.ports.get('serve', 'none')}.",
            )


def _environment(
    document: Document, documents: list[Document], settings: FleetSettings, pods: list[Pod]
) -> Iterator[Problem]:
    """The same in every Ray container, and what `trifleet up` would set for these settings."""
    maps = {d.name: d.values.get("data") or {} for d in documents if d.kind == "ConfigMap"}
    for pod in pods:
        path: Path = (*pod.path, "spec", "containers", 0)
        container = document.at(path) or {}
        variables: dict[str, Any] = {}
        for source in container.get("envFrom") or []:
            variables |= maps.get(str((source.get("configMapRef") or {}).get("name")), {})
        variables |= {entry["name"]: entry.get("value") for entry in container.get("env") or [] if "name" in entry}
        for name, value in environment(settings).items():
            if variables.get(name) != value:
                yield document.problem(
                    (*path, "envFrom"),
                    f"{name} is {variables.get(name)!r} in {pod.title}, but the settings need {value!r}: take the "
                    "environment that `trifleet k8s render` writes.",
                )


def _sizes(
    document: Document, config: Document, args: Path, settings: FleetSettings, pods: list[Pod]
) -> Iterator[Problem]:
    """Whether so many replicas fit the worker pods, at most of them.

    Where pods follow replicas, one pod more: KubeRay counts a pod that drains until it is gone, and the successors of
    its replicas need room meanwhile. A fixed number of pods is raised by hand before a drain.
    """
    room = spare = 0
    scales = document.at(("spec", "rayClusterConfig", "enableInTreeAutoscaling"))
    for index, group in enumerate(document.at(GROUPS_PATH) or []):
        path: Path = (*GROUPS_PATH, index)
        minimum, maximum = group.get("minReplicas", 0), group.get("maxReplicas", 0)
        if minimum != maximum and not scales:
            yield document.problem(
                (*path, "maxReplicas"),
                f"worker group {group.get('groupName')} may have {minimum} to {maximum} pods, but nothing scales it: "
                "set enableInTreeAutoscaling, or make both equal.",
            )
        limits = document.at((*path, "template", "spec", "containers", 0, "resources", "limits")) or {}
        # What Ray counts as its own: a parameter, else the container's limit.
        parameters = document.at((*path, "rayStartParams")) or {}
        has = {
            "cpu": parameters.get("num-cpus", limits.get("cpu", 0)),
            GPU: parameters.get("num-gpus", limits.get(GPU, 0)),
        }
        fits = [
            int((quantity(has[name]) or 0) / wanted)
            for name, wanted in (("cpu", settings.cpus_per_replica), (GPU, settings.gpus_per_replica))
            if wanted
        ]
        room += maximum * min(fits, default=1)
        spare = max(spare, min(fits, default=1))
    name = ("autoscaling", "max_replicas") if settings.autoscaling else ("replicas",)
    line = config.line((*args, *name))
    if room < settings.most_replicas:
        yield Problem(
            line,
            f"{document.title}: {settings.most_replicas} replicas of {settings.cpus_per_replica:g} CPUs and "
            f"{settings.gpus_per_replica:g} GPUs do not fit the worker pods, which hold {room}: raise maxReplicas or "
            "the limits.",
        )
    elif scales and room < settings.most_replicas + spare:
        yield Problem(
            line,
            f"{document.title}: {settings.most_replicas} replicas fill the worker pods, which hold {room}, so none has "
            "room for the successors of a pod that drains: raise maxReplicas by one.",
        )
    parallel = settings.engine.extra.get("tensor_parallel_size", 1)
    if settings.gpus_per_replica and parallel != settings.gpus_per_replica:
        yield Problem(
            config.line((*args, "gpus_per_replica")),
            f"{document.title}: gpus_per_replica is {settings.gpus_per_replica:g} and tensor_parallel_size is "
            f"{parallel}: make them equal.",
        )


def _drain(document: Document, settings: FleetSettings, pods: list[Pod]) -> Iterator[Problem]:
    needed = settings.drain_seconds
    remedy = f"the settings let a replica drain for {needed:g} s (drain_seconds)"
    path: Path = ("spec", "rayClusterDeletionDelaySeconds")
    delay = document.at(path)
    if not isinstance(delay, int) or delay < needed:
        yield document.problem(path, f"spec.rayClusterDeletionDelaySeconds is {delay}: {remedy}, so set it to as much.")
    for pod in pods:
        if pod.labels["ray.io/node-type"] == "head":
            continue
        hook: Path = (*pod.path, "spec", "containers", 0, "lifecycle", "preStop", "exec", "command")
        command = document.at(hook) or []
        waits = float(command[command.index("--seconds") + 1]) if "--seconds" in command[:-1] else 0.0
        if waits < needed + DRAIN_MARGIN_SECONDS:
            yield document.problem(
                hook, f"the preStop hook of {pod.title} waits {waits:g} s: {remedy}, so let it wait "
                f"{DRAIN_MARGIN_SECONDS} s more than that."
            )  # fmt: skip
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if grace < waits + STOP_MARGIN_SECONDS:
            yield document.problem(
                (*pod.path, "spec", "terminationGracePeriodSeconds"),
                f"terminationGracePeriodSeconds of {pod.title} is {grace}, and its preStop hook may take {waits:g} s: "
                f"set {waits + STOP_MARGIN_SECONDS:g} or more.",
            )


def _model(document: Document, settings: FleetSettings, pods: list[Pod]) -> Iterator[Problem]:
    """A model by path lies on a volume of every pod: the router reads its tokenizer, wherever it is placed."""
    files = {"model": settings.model}
    if settings.compression is not None and settings.compression.statistics is not None and settings.model != "bundled":
        files["compression.statistics"] = str(settings.compression.statistics)
    for name, file in files.items():
        if not file.startswith("/"):
            continue
        for pod in pods:
            mounts = [mount.get("mountPath") for _, c in pod.containers for mount in c.get("volumeMounts") or []]
            if not any(PurePosixPath(file).is_relative_to(mount) for mount in mounts):
                yield document.problem(
                    (*pod.path, "spec", "containers", 0, "volumeMounts"),
                    f"{name} of the settings is {file}, which lies on no volume of {pod.title}: mount it.",
                )
