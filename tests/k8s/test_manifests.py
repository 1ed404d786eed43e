"""What is rendered from `k8s/`: made from the settings, valid, and in production hardened."""

import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dashboards.files import EXPORTED, RULES
from deploy.fleet import RAY
from deploy.haproxy import environment
from deploy.kubernetes import agreement, drain
from deploy.kubernetes.documents import read_documents
from deploy.kubernetes.render import CONFIGS, OVERLAYS, WITHOUT_KEYS, serve_config, write_all
from deploy.kubernetes.schemas import VENDORED, read_definition
from deploy.kubernetes.validate import validate
from deploy.kubernetes.workloads import Pod, pods
from deploy.settings import FleetSettings, load_settings, parse_settings
from tests.k8s import conftest
from tests.k8s.conftest import CRDS, ROOT, rendered
from tests.observability import debian

FOLDERS = [*(f"overlays/{name}" for name in conftest.OVERLAYS), "monitoring/operator", "monitoring/plain", "models"]


def manifests(folder: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(rendered(folder)))


def one(folder: str, kind: str, name: str = "trifleet") -> dict[str, Any]:
    (found,) = (m for m in manifests(folder) if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def production_pods() -> list[Pod]:
    return [pod for pod in pods(read_documents(rendered("overlays/production"))[0]) if pod.template]


def test_every_overlay_is_known() -> None:
    folders = sorted(folder.name for folder in (ROOT / "k8s" / "overlays").iterdir())
    assert folders == sorted(OVERLAYS) == sorted(conftest.OVERLAYS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_rendered_is_valid_by_the_definitions_themselves(folder: str) -> None:
    """Not by the copies that the tool brings."""
    count, problems = validate(rendered(folder), CRDS if CRDS.is_dir() else None)
    assert problems == []
    assert count == len(manifests(folder))


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"the projects' definitions are not in {CRDS}")
def test_the_built_in_definitions_are_those_of_the_projects() -> None:
    kept = {file.name: json.loads(gzip.decompress(file.read_bytes())) for file in VENDORED.glob("*.json.gz")}
    published = {
        f"{api_version.replace('/', '_')}_{kind}.json.gz": schema
        for file in CRDS.glob("*.yaml")
        for (api_version, kind), schema in read_definition(file.read_text()).items()
    }
    assert kept == published, f"run `python -m deploy.kubernetes.schemas {CRDS}`"


def test_what_is_generated_is_committed(tmp_path: Path) -> None:
    (tmp_path / "monitoring" / "operator").mkdir(parents=True)
    for file in write_all(tmp_path, RULES):
        committed = ROOT / "k8s" / file.relative_to(tmp_path)
        assert committed.read_text() == file.read_text(), "run `trifleet k8s render`"


def test_the_serve_config_is_the_settings_file_that_trifleet_up_reads(overlay: str) -> None:
    file = CONFIGS / OVERLAYS[overlay]
    text = one(f"overlays/{overlay}", "RayService")["spec"]["serveConfigV2"]
    assert text == serve_config(file, without_keys=overlay in WITHOUT_KEYS)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    # The file, and in so many words that no key is needed: pods do not see on which address HAProxy listens.
    values = {"access": {"required": False}, **yaml.safe_load(file.read_text())}
    assert application.args == values
    assert FleetSettings.model_validate(application.args) == parse_settings(values)


def test_every_ray_pod_has_the_environment_of_trifleet_up(overlay: str) -> None:
    settings = load_settings(CONFIGS / OVERLAYS[overlay])
    (variables,) = (
        m for m in manifests(f"overlays/{overlay}") if m["metadata"]["name"].startswith("trifleet-environment-")
    )
    assert variables["data"].items() >= {**RAY, **environment(settings)}.items()
    containers = re.findall(rf"name: {variables['metadata']['name']}", rendered(f"overlays/{overlay}"))
    assert len(containers) == 3, "the ConfigMap itself, the head, the workers"


def test_a_change_of_the_environment_changes_the_pods() -> None:
    """Its name carries a hash, so KubeRay sees other pods and starts a new cluster."""
    names = set()
    for name in ("cpu-demo", "gpu"):
        template = one(f"overlays/{name}", "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
        names.add(template["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"])
    assert len(names) == 2


def test_the_version_of_ray_is_the_pinned_one() -> None:
    assert f"ray=={agreement.RAY}" in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()


@pytest.mark.parametrize("limits", [{}, {"request_seconds": 86_400.5}])
def test_a_haproxy_that_was_replaced_cuts_no_request_that_the_limits_allow(limits: dict[str, float]) -> None:
    settings = parse_settings({"served_model_name": "m", "drain_seconds": 60, "limits": limits})
    longest = settings.coordinator.queue_deadline_seconds + settings.limits.request_seconds
    assert int(environment(settings)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > longest


def test_production_pods_are_hardened() -> None:
    for pod in production_pods():
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["enableServiceLinks"] is False
        for _, container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_only_the_pod_of_the_autoscaler_has_a_token() -> None:
    with_token = [pod.title for pod in production_pods() if pod.spec["automountServiceAccountToken"]]
    assert with_token == ["the head"]


def test_what_a_read_only_pod_writes_to_is_a_volume(overlay: str) -> None:
    for pod in pods(read_documents(rendered(f"overlays/{overlay}"))[0]):
        if not pod.is_ray or not pod.template:
            continue
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        (container,) = (container for _, container in pod.containers)
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        for path in ("/tmp", "/home/trifleet", "/dev/shm"):
            assert "sizeLimit" in mounts[path]["emptyDir"]


def test_production_scales_replicas_nodes_and_survives_its_head() -> None:
    cluster = one("overlays/production", "RayService")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "trifleet-redis"
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] < workers["maxReplicas"]


def test_production_denies_what_no_policy_allows() -> None:
    policies = {
        m["metadata"]["name"]: m["spec"] for m in manifests("overlays/production") if m["kind"] == "NetworkPolicy"
    }
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert policies.keys() >= {"ray", "clients", "operator", "prometheus", "head", "redis"}


def test_a_probe_never_asks_an_engine() -> None:
    """A pod that loads a model is alive: only Ray's own health restarts it."""
    for pod in production_pods():
        for _, container in pod.containers:
            if pod.is_ray:
                for probe in ("startupProbe", "livenessProbe"):
                    assert container[probe]["httpGet"]["path"] == "/api/local_raylet_healthz"


def test_every_dashboard_is_a_config_map_that_grafanas_sidecar_takes() -> None:
    found = [m for m in manifests("monitoring/operator") if m["kind"] == "ConfigMap"]
    files = sorted(EXPORTED.glob("*.json"))
    assert sorted(f"{m['metadata']['name']}.json" for m in found) == [file.name for file in files]
    for manifest in found:
        ((name, text),) = manifest["data"].items()
        assert text == (EXPORTED / name).read_text()
        assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert len(json.dumps(manifest)) < 2**20, "a ConfigMap holds 1 MiB at most"


def test_the_rules_are_those_of_the_dashboards() -> None:
    rules = yaml.safe_load(RULES.read_text())
    assert one("monitoring/operator", "PrometheusRule")["spec"] == rules
    (plain,) = one("monitoring/plain", "ConfigMap", "trifleet-rules")["data"].values()
    assert yaml.safe_load(plain) == rules


def test_prometheus_accepts_the_plain_scrape_config(tmp_path: Path) -> None:
    """All of it but the discovery, which Debian builds Prometheus without."""
    (text,) = one("monitoring/plain", "ConfigMap", "trifleet-scrape")["data"].values()
    config = yaml.safe_load(text)
    for job in config["scrape_configs"]:
        (discovery,) = job.pop("kubernetes_sd_configs")
        assert discovery["role"] in ("pod", "endpointslice")
        assert discovery["namespaces"] == {"names": ["trifleet"]}
    file = tmp_path / "scrape.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [debian.tool("promtool", "prometheus"), "check", "config", "--lint-fatal", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_pod_that_serves_nothing_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "cmdline").write_bytes(b"/bin/raylet\0--x\0")
    (tmp_path / "13").mkdir()
    (tmp_path / "self").mkdir()
    assert drain.serves_here(tmp_path) is False


def target_labels(tmp_path: Path, path: str, relabelings: list[dict[str, Any]], pod: str, ip: str) -> dict[str, str]:
    """What Prometheus itself makes of a head that it has discovered."""
    discovered = {
        "__meta_kubernetes_namespace": "trifleet",
        "__meta_kubernetes_pod_name": pod,
        "__meta_kubernetes_service_label_ray_io_identifier": "trifleet-head",
        "__meta_kubernetes_endpointslice_port_name": "serve",
    }
    job = {
        "job_name": "fleet",
        "metrics_path": path,
        "relabel_configs": relabelings,
        "static_configs": [{"targets": [f"{ip}:8000"], "labels": discovered}],
    }
    file = tmp_path / "discovery.yaml"
    file.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    command = [
        debian.tool("promtool", "prometheus"),
        "check",
        "service-discovery",
        "--timeout=200ms",
        str(file),
        "fleet",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    ((target,),) = [json.loads(done.stdout)]
    return {name: value for name, value in target["labels"].items() if not name.startswith("__")}


def scraped(flavour: str) -> dict[str, list[dict[str, Any]]]:
    """Path -> relabelings of the fleet's two pages."""
    if flavour == "plain":
        (text,) = one("monitoring/plain", "ConfigMap", "trifleet-scrape")["data"].values()
        jobs = [job for job in yaml.safe_load(text)["scrape_configs"] if job["job_name"] != "trifleet-ray"]
        return {
            job.get("metrics_path", "/metrics"): [*job["relabel_configs"], {"target_label": "job",
                                                                            "replacement": job["job_name"]}]
            for job in jobs
        }  # fmt: skip
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    # The operator's own come first.
    first = {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"}
    return {
        endpoint["path"]: [first, *({names.get(k, k): v for k, v in r.items()} for r in endpoint["relabelings"])]
        for endpoint in one("monitoring/operator", "ServiceMonitor", "trifleet-fleet")["spec"]["endpoints"]
    }


@pytest.mark.parametrize("flavour", ["operator", "plain"])
def test_the_fleets_series_outlive_the_head_and_its_two_pages_are_told_apart(tmp_path: Path, flavour: str) -> None:
    pages = scraped(flavour)
    assert sorted(pages) == ["/metrics", "/metrics/engines"]
    before, after = (
        [target_labels(tmp_path, path, relabelings, *head) for path, relabelings in pages.items()]
        for head in (("head-a", "10.0.0.1"), ("head-b", "10.0.0.2"))
    )
    assert before == after
    assert before[0] != before[1]
    assert [labels["cluster"] for labels in before] == ["trifleet", "trifleet"]


@pytest.mark.parametrize("title", [b"ray::ServeReplica:trifleet:replica\0", b"ray::HAProxyManager\0\0"])
def test_a_pod_waits_for_its_replicas_and_for_streams_of_others_that_pass_through_it(
    tmp_path: Path, title: bytes
) -> None:
    (tmp_path / "13").mkdir()
    (tmp_path / "13" / "cmdline").write_bytes(title)
    assert drain.serves_here(tmp_path) is True
