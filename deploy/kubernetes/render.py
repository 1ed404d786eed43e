"""What the manifests in `k8s/` take from elsewhere: the settings of `deploy/configs`, the rules of `dashboards`.

Owns the text of `serveConfigV2`, which Ray Serve deploys, and of the environment that every Ray process of the
fleet must have before it starts. `trifleet k8s render` writes both; the manifests only refer to them.
"""

from pathlib import Path
from typing import Any

import yaml

from deploy import haproxy
from deploy.fleet import RAY
from deploy.settings import FleetSettings, load_settings, parse_settings

APP, BUILDER = "trifleet", "deploy.app:fleet"
NAME = "trifleet"
# Where the image has the wrapper that Ray starts as HAProxy (Dockerfile).
WRAPPER = "/opt/trifleet/haproxy/haproxy"

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = {
    "cpu-demo": "local.yaml",
    "gpu": "gpu.yaml",
    "gpu-tensor-parallel": "gpu-tensor-parallel.yaml",
    "production": "production.yaml",
}
"""Overlay of `k8s/overlays` -> its settings file in `deploy/configs`."""

WITHOUT_KEYS = frozenset({"cpu-demo"})
"""Its settings are those of a fleet on the loopback; in the cluster its service is reached by port-forward."""

_GENERATED = "# Generated from {source} by `trifleet k8s render`: change that, not this.\n"


def serve_config(file: Path, without_keys: bool = False) -> str:
    """The Serve config of a settings file, for `serve deploy` or a RayService. Raises `SettingsError`.

    `without_keys`: whoever reaches the service may use it, unless the settings say otherwise.
    `http.host` stays behind: in a pod HAProxy listens on every interface.
    """
    load_settings(file)  # its sentences, for a file that cannot be read as well
    values = yaml.safe_load(file.read_text())
    if without_keys:
        values = {"access": {"required": False}, **values}
    settings = parse_settings(values, str(file))
    # Said in so many words, because the pods do not see on which address HAProxy listens.
    values["access"] = {**values.get("access", {}), "required": settings.keys_required("0.0.0.0")}
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": settings.http.port},
        "logging_config": {"enable_access_log": False},
        "applications": [{"name": APP, "route_prefix": "/", "import_path": BUILDER, "args": values}],
    }
    return yaml.safe_dump(config, sort_keys=False)


def environment(settings: FleetSettings) -> dict[str, str]:
    """Variables of every pod of the Ray cluster: as `trifleet up` sets them, but for ports and files of its own."""
    return {
        **RAY,
        **haproxy.environment(settings),
        "RAY_SERVE_HAPROXY_BINARY_PATH": WRAPPER,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(haproxy.POD_STATS_PORT),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(haproxy.POD_METRICS_PORT),
    }


def write_generated(settings_file: Path, folder: Path, without_keys: bool = False) -> list[Path]:
    """An overlay's `generated/`: a patch of the RayService, and the environment for its ConfigMap."""
    source = _GENERATED.format(source=f"{settings_file.parent.name}/{settings_file.name}")
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {"serveConfigV2": _Text(serve_config(settings_file, without_keys))},
    }
    variables = environment(load_settings(settings_file))
    folder.mkdir(parents=True, exist_ok=True)
    serve, env = folder / "serve.yaml", folder / "environment.env"
    serve.write_text(source + yaml.dump(patch, Dumper=_Dumper, sort_keys=False))
    env.write_text(source + "".join(f"{name}={value}\n" for name, value in variables.items()))
    return [serve, env]


def write_rules(rules: Path, file: Path) -> Path:
    """The PrometheusRule with the groups of a Prometheus rules file."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": NAME},
        "spec": yaml.safe_load(rules.read_text()),
    }
    text = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120)
    file.write_text(_GENERATED.format(source=f"dashboards/rules/{rules.name}") + text)
    return file


def write_all(root: Path, rules: Path) -> list[Path]:
    """Everything that is generated below `root`, the folder `k8s` of a checkout."""
    files = []
    for overlay, settings in OVERLAYS.items():
        folder = root / "overlays" / overlay / "generated"
        files += write_generated(CONFIGS / settings, folder, without_keys=overlay in WITHOUT_KEYS)
    return [*files, write_rules(rules, root / "monitoring" / "operator" / "rules.yaml")]


class _Text(str):
    """A string that is written as a block, line by line."""


class _Dumper(yaml.SafeDumper):
    pass


def _block(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")


def _string(dumper: yaml.SafeDumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(_Text, _block)
_Dumper.add_representer(str, _string)
