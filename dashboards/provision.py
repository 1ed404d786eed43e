"""Puts the dashboards into a running Grafana through its HTTP API, by `grafana-client`.

Idempotent: what is there and equal stays untouched, so that a push in a deployment's pipeline makes no new
versions. (`grafana-client` is the maintained continuation of `grafana-api`.)
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaClientError, GrafanaException, TokenAuth

from dashboards.catalog import dashboards, to_json

DATASOURCE_NAME = "Prometheus"


class ProvisionError(Exception):
    """The push did not succeed; the message says why and what to do."""


@dataclass(frozen=True)
class Pushed:
    title: str
    outcome: Literal["created", "updated", "unchanged"]
    url: str


def push(url: str, token: str, folder: str, prometheus: str = "http://localhost:9090") -> list[Pushed]:
    """Create or update every dashboard in the folder of this title, which is created if missing.

    If Grafana has no Prometheus datasource at all, one is created for the server at `prometheus`, as Grafana
    reaches it. Raises `ProvisionError`.
    """
    grafana = GrafanaApi.from_url(url, credential=TokenAuth(token))
    try:
        _ensure_datasource(grafana, prometheus)
        folder_uid = _ensure_folder(grafana, folder)
        return [_push_one(grafana, json.loads(to_json(made)), folder_uid) for made in dashboards()]
    except GrafanaClientError as error:
        if error.status_code in (401, 403):
            raise ProvisionError(
                f"Grafana at {url} refuses the token: use one of a service account with the role Admin, which "
                f"creating datasources needs, or Editor where the datasource exists ({error.message})"
            ) from None
        raise ProvisionError(f"Grafana at {url} refuses the dashboards: {error.message}") from None
    except GrafanaException as error:
        raise ProvisionError(f"Grafana at {url} failed: {error.message}") from None
    except OSError as error:
        raise ProvisionError(f"Grafana at {url} does not answer: check the address ({error})") from None


def _ensure_datasource(grafana: GrafanaApi, prometheus: str) -> None:
    if any(source["type"] == "prometheus" for source in grafana.datasource.list_datasources()):
        return
    grafana.datasource.create_datasource(
        {
            "name": DATASOURCE_NAME,
            "type": "prometheus",
            "access": "proxy",
            "url": prometheus,
            "isDefault": True,
            # Grafana reads windows of four of these; it must not be shorter than Prometheus' scrape interval.
            "jsonData": {"httpMethod": "POST", "timeInterval": "15s"},
        }
    )


def _ensure_folder(grafana: GrafanaApi, title: str) -> str:
    for folder in grafana.folder.get_all_folders():
        if folder["title"] == title:
            return str(folder["uid"])
    return str(grafana.folder.create_folder(title)["uid"])


def _push_one(grafana: GrafanaApi, wanted: dict[str, Any], folder_uid: str) -> Pushed:
    stored = _stored(grafana, wanted["uid"])
    if stored and stored["meta"]["folderUid"] == folder_uid and _contains(stored["dashboard"], wanted):
        return Pushed(wanted["title"], "unchanged", stored["meta"]["url"])
    answer = grafana.dashboard.update_dashboard(
        {"dashboard": wanted, "folderUid": folder_uid, "overwrite": True, "message": "trifleet dashboards push"}
    )
    return Pushed(wanted["title"], "created" if stored is None else "updated", answer["url"])


def _stored(grafana: GrafanaApi, uid: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = grafana.dashboard.get_dashboard(uid)
    except GrafanaClientError as error:
        if error.status_code == 404:
            return None
        raise
    return found


def _contains(stored: Any, wanted: Any) -> bool:
    """Is everything that we want there as it is? Grafana adds `id`, `version` and defaults of its own."""
    if isinstance(wanted, dict) and isinstance(stored, dict):
        return all(name in stored and _contains(stored[name], value) for name, value in wanted.items())
    if isinstance(wanted, list) and isinstance(stored, list):
        return len(wanted) == len(stored) and all(map(_contains, stored, wanted))
    return bool(stored == wanted)
