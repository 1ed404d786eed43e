"""Schemas of manifests: custom resources from their definitions, core kinds from the package kubernetes-validate.

The definitions of the kinds that our manifests use are kept here without their descriptions (`schemas/`), because
RayService's alone is a megabyte; a folder of definitions given by the user adds to them. Renew with
`python -m deploy.kubernetes.schemas FOLDER` from a folder of CustomResourceDefinitions.
"""

import copy
import difflib
import functools
import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry, Resource

from deploy.kubernetes.documents import Document, Problem, dotted
from deploy.kubernetes.documents import Path as ValuePath

VENDORED = Path(__file__).parent / "schemas"
# Of Kubernetes, for the core kinds: the newest that kubernetes-validate has.
_DEFINITIONS = "/api/_definitions.json"
_OBJECT_META = f"{_DEFINITIONS}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"

Schema = dict[str, Any]
Kind = tuple[str, str]
"""apiVersion and kind."""


class MissingPackageError(RuntimeError):
    """The message says what to install."""


@functools.cache
def read_definition(text: str) -> dict[Kind, Schema]:
    """The schemas in one CustomResourceDefinition, one per version, without descriptions."""
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    spec = definition["spec"]
    group, kind = spec["group"], spec["names"]["kind"]
    return {
        (f"{group}/{version['name']}", kind): _without_descriptions(version["schema"]["openAPIV3Schema"])
        for version in spec["versions"]
        if version["served"] and not version.get("deprecated")
    }


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, dict):
        # A property may be called "description": only a text is one.
        return {
            key: _without_descriptions(value)
            for key, value in node.items()
            if not (key == "description" and isinstance(value, str))
        }
    if isinstance(node, list):
        return [_without_descriptions(item) for item in node]
    return node


def vendor(folder: Path, out: Path = VENDORED) -> list[Path]:
    """Keep the definitions in `folder` in compact form."""
    written = []
    for file in sorted(folder.glob("*.yaml")):
        for (api_version, kind), schema in read_definition(file.read_text()).items():
            target = out / f"{api_version.replace('/', '_')}_{kind}.json.gz"
            target.write_bytes(gzip.compress(json.dumps(schema, separators=(",", ":")).encode(), mtime=0))
            written.append(target)
    return written


@functools.cache
def vendored() -> dict[Kind, Schema]:
    found: dict[Kind, Schema] = {}
    for file in VENDORED.glob("*.json.gz"):
        group, version, kind = file.name.removesuffix(".json.gz").split("_")
        found[f"{group}/{version}", kind] = json.loads(gzip.decompress(file.read_bytes()))
    return found


class Schemas:
    """Validates documents of the kinds that it knows."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: further CustomResourceDefinitions, which go before the ones kept here."""
        self._custom = dict(vendored())
        if folder is not None:
            for file in sorted(folder.glob("*.yaml")):
                self._custom |= read_definition(file.read_text())
        self._validators: dict[Kind, Draft202012Validator] = {}

    def problems(self, document: Document) -> Iterator[Problem]:
        """What its schema refuses. Defaults of a custom resource are applied first, since it may require them."""
        kind = str(document.values.get("apiVersion", "")), document.kind
        values: Any = document.values
        if custom := self._custom.get(kind):
            values = with_defaults(values, custom)
            validator = self._validator(kind, lambda: _closed(custom))
        else:
            core = _core_schema(kind)
            if core is None:
                yield document.problem(
                    ("kind",),
                    f"there is no schema for kind {document.kind!r} of apiVersion {kind[0]!r}: correct them, or name a "
                    "folder with its CustomResourceDefinition with --crds.",
                )
                return
            validator = self._validator(kind, lambda: core)
        for error in validator.iter_errors(values):
            yield from _sentences(document, error)

    def _validator(self, kind: Kind, schema: Callable[[], Schema]) -> Draft202012Validator:
        if kind not in self._validators:
            self._validators[kind] = Draft202012Validator(schema(), registry=_registry())
        return self._validators[kind]


def with_defaults(value: Any, schema: Schema) -> Any:
    """A copy of the value in which what is missing has its default, as the API server stores it."""
    if isinstance(value, dict):
        value = dict(value)
        for name, child in schema.get("properties", {}).items():
            if name not in value and "default" in child:
                value[name] = copy.deepcopy(child["default"])
            if name in value:
                value[name] = with_defaults(value[name], child)
        if isinstance(every := schema.get("additionalProperties"), dict):
            known = schema.get("properties", {})
            value = {key: item if key in known else with_defaults(item, every) for key, item in value.items()}
        return value
    if isinstance(value, list) and isinstance(items := schema.get("items"), dict):
        return [with_defaults(item, items) for item in value]
    return value


def _closed(schema: Schema) -> Schema:
    """As JSON schema that refuses fields which the API server would drop or refuse."""
    closed = _close(schema)
    # Every custom resource may say these; its definition need not list them.
    closed["properties"] |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"$ref": _OBJECT_META},
    }
    closed.setdefault("required", []).extend(["apiVersion", "kind", "metadata"])
    return closed


def _close(node: Any) -> Any:
    if isinstance(node, list):
        return [_close(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _close(value) for key, value in node.items()}
    is_open = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
    # `properties` with a `type` beside it is a schema; without, it may be a property of that name.
    if node.get("type") == "object" and isinstance(node.get("properties"), dict) and not is_open:
        closed["additionalProperties"] = False
    if node.get("nullable") is True and isinstance(node.get("type"), str):
        closed["type"] = [node["type"], "null"]
    return closed


def _core_schema(kind: Kind) -> Schema | None:
    api_version, name = kind
    group, _, version = api_version.rpartition("/")
    suffix = f"{group.split('.')[0]}-{version}" if group else version
    return _core_file(f"{name.lower()}-{suffix}.json")


@functools.cache
def _core_file(name: str) -> Schema | None:
    try:
        from kubernetes_validate import utils
    except ImportError:
        raise MissingPackageError(
            "The schemas of Kubernetes are missing: install the package kubernetes-validate "
            "(pip install 'triattention-fleet[k8s]')."
        ) from None
    version = utils.latest_version()
    try:
        schema: Schema = utils.schema_contents(f"kubernetes-json-schema/v{version}-local-strict/{name}", version)
    except FileNotFoundError:
        return None
    return schema


@functools.cache
def _registry() -> Registry[Any]:
    definitions = _core_file("_definitions.json")
    assert definitions is not None
    registry: Registry[Any] = Registry()
    # Crawled once: every validator would look through all definitions anew.
    return registry.with_resource(_DEFINITIONS, Resource.from_contents(definitions)).crawl()


def _sentences(document: Document, error: ValidationError) -> Iterator[Problem]:
    path: ValuePath = tuple(error.absolute_path)
    where = dotted(path) or "the document"
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = sorted(error.schema.get("properties", {}))
        for name in error.instance.keys() - set(known):
            close = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {close[0]}?" if close else "remove it, or correct its name."
            yield document.problem((*path, name), f"{dotted((*path, name))} is not a field of {where}: {remedy}")
    elif error.validator == "required" and isinstance(error.instance, dict):
        for name in error.validator_value:
            if name not in error.instance:
                yield document.problem(path, f"{dotted((*path, name))} is missing: set it.")
    elif error.validator == "type":
        wanted = error.validator_value
        wanted = [wanted] if isinstance(wanted, str) else [name for name in wanted if name != "null"]
        yield document.problem(path, f"{where} is {_shown(error.instance)}: it must be of type {' or '.join(wanted)}.")
    elif error.validator == "enum":
        choices = ", ".join(map(str, error.validator_value))
        yield document.problem(path, f"{where} is {_shown(error.instance)}: choose one of {choices}.")
    elif error.validator in ("anyOf", "oneOf") and error.schema.get("x-kubernetes-int-or-string"):
        yield document.problem(path, f"{where} is {_shown(error.instance)}: it must be a number or a text.")
    else:
        yield document.problem(path, f"{where} is {_shown(error.instance)}, which its schema refuses: {error.message}.")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return json.dumps(value, default=str)


if __name__ == "__main__":
    print(*vendor(Path(sys.argv[1])), sep="\n")
