"""YAML documents with the line of every value, so that a mistake can be pointed at."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Keys and indices from a document's root to a value."""


@dataclass(frozen=True, order=True)
class Problem:
    line: int
    """Of the input, from 1."""
    sentence: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.sentence}"


@dataclass(frozen=True)
class Document:
    """One manifest: its values, and where each of them begins."""

    values: dict[str, Any]
    lines: dict[Path, int]

    @property
    def kind(self) -> str:
        return str(self.values.get("kind", ""))

    @property
    def name(self) -> str:
        metadata = self.values.get("metadata")
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}".strip()

    def line(self, path: Path) -> int:
        """Of the value at `path`, or of what is nearest around it if it is missing."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def at(self, path: Path) -> Any:
        """The value there; None if it, or something on the way, is missing."""
        value: Any = self.values
        for part in path:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def problem(self, path: Path, sentence: str) -> Problem:
        return Problem(self.line(path), f"{self.title}: {sentence}")


@dataclass
class _Reader:
    """Turns YAML nodes into values and notes lines and duplicate keys on the way."""

    first_line: int
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    scalars: yaml.constructor.SafeConstructor = field(default_factory=yaml.constructor.SafeConstructor)

    def read(self, node: yaml.Node, path: Path = ()) -> Any:
        self.lines.setdefault(path, self.first_line + node.start_mark.line)
        if isinstance(node, yaml.MappingNode):
            self.scalars.flatten_mapping(node)
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self.scalars.construct_object(key_node)
                line = self.first_line + key_node.start_mark.line
                if key in values:
                    where = dotted((*path, key))
                    self.problems.append(Problem(line, f"{where} is there twice: the last one would win, keep one."))
                self.lines[(*path, key)] = line
                values[key] = self.read(value_node, (*path, key))
            return values
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = self.first_line + item.start_mark.line
                items.append(self.read(item, (*path, index)))
            return items
        return self.scalars.construct_object(node)


def read_documents(text: str, first_line: int = 1) -> tuple[list[Document], list[Problem]]:
    """The documents of a YAML stream, and what is wrong with it as YAML. Empty documents are left out."""
    documents: list[Document] = []
    problems: list[Problem] = []
    try:
        for node in yaml.compose_all(text, Loader=yaml.CSafeLoader):
            reader = _Reader(first_line)
            values = reader.read(node)
            problems += reader.problems
            if isinstance(values, dict):
                documents.append(Document(values, reader.lines))
            elif values is not None:
                line = reader.lines[()]
                problems.append(Problem(line, "A document must be a mapping with apiVersion, kind and metadata."))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = first_line + (mark.line if mark else 0)
        problems.append(Problem(line, f"This is not valid YAML: {error.problem}."))
    except yaml.YAMLError as error:
        problems.append(Problem(first_line, f"This is not valid YAML: {' '.join(str(error).split())}."))
    return documents, problems


def dotted(path: Path) -> str:
    """`spec.containers[0].image`; keys with dots or slashes in brackets."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part}]"
    return text


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value below one, with its path."""
    yield path, value
    if isinstance(value, dict):
        for key, child in value.items():
            yield from walk(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from walk(child, (*path, index))
