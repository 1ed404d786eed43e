"""Pushing into Grafana, against a fake Grafana that speaks the few calls of its HTTP API that a push needs."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from dashboards.catalog import dashboards
from dashboards.cli import app
from dashboards.provision import ProvisionError, push

TOKEN = "secret"
TITLES = ["Fleet capacity", "Compaction", "Requests", "Routing"]


class FakeGrafana:
    """Folders, datasources and dashboards in memory; `writes` are the calls that changed something."""

    def __init__(self):
        self.folders = []
        self.datasources = []
        self.dashboards = {}
        self.writes = []
        handler = type("Handler", (_FakeGrafanaHandler,), {"grafana": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def get(self, path):
        if path == "/api/folders":
            return 200, self.folders
        if path == "/api/datasources":
            return 200, self.datasources
        uid = path.removeprefix("/api/dashboards/uid/")
        if uid in self.dashboards:
            return 200, self.dashboards[uid]
        return 404, {"message": "Dashboard not found"}

    def post(self, path, body):
        self.writes.append(path)
        if path == "/api/folders":
            self.folders.append({"title": body["title"], "uid": f"folder-{len(self.folders)}"})
            return 200, self.folders[-1]
        if path == "/api/datasources":
            self.datasources.append(body)
            return 200, {"message": "Datasource added"}
        wanted = body["dashboard"]
        known = self.dashboards.get(wanted["uid"])
        if known and not body.get("overwrite"):
            return 412, {"message": "A dashboard with the same uid already exists"}
        version = known["dashboard"]["version"] + 1 if known else 1
        stored = {**wanted, "id": len(self.dashboards), "version": version, "weekStart": ""}
        url = f"/d/{wanted['uid']}"
        self.dashboards[wanted["uid"]] = {
            "dashboard": stored, "meta": {"folderUid": body["folderUid"], "url": url},
        }  # fmt: skip
        return 200, {"uid": wanted["uid"], "url": url, "version": version, "status": "success"}


class _FakeGrafanaHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(lambda: self.grafana.get(self.path))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(lambda: self.grafana.post(self.path, body))

    def _answer(self, make):
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        status, value = make() if allowed else (401, {"message": "Invalid API key"})
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def grafana():
    fake = FakeGrafana()
    yield fake
    fake.stop()


def outcomes(pushed):
    return [(one.title, one.outcome) for one in pushed]


def test_a_first_push_makes_folder_datasource_and_dashboards(grafana):
    pushed = push(grafana.url, TOKEN, "Fleet", prometheus="http://prometheus:9090")
    assert outcomes(pushed) == [(title, "created") for title in TITLES]
    assert [folder["title"] for folder in grafana.folders] == ["Fleet"]
    (source,) = grafana.datasources
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert {stored["meta"]["folderUid"] for stored in grafana.dashboards.values()} == {"folder-0"}
    assert set(grafana.dashboards) == {dashboard.uid for dashboard in dashboards()}


def test_a_second_push_changes_nothing(grafana):
    push(grafana.url, TOKEN, "Fleet")
    grafana.writes.clear()
    assert outcomes(push(grafana.url, TOKEN, "Fleet")) == [(title, "unchanged") for title in TITLES]
    assert grafana.writes == []


def test_a_dashboard_that_someone_edited_is_put_right_and_no_other(grafana):
    push(grafana.url, TOKEN, "Fleet")
    del grafana.dashboards["trifleet-routing"]["dashboard"]["panels"][3]
    assert outcomes(push(grafana.url, TOKEN, "Fleet"))[-1] == ("Routing", "updated")
    assert [stored["dashboard"]["version"] for stored in grafana.dashboards.values()] == [1, 1, 1, 2]


def test_a_push_into_another_folder_moves_the_dashboards(grafana):
    push(grafana.url, TOKEN, "Fleet")
    push(grafana.url, TOKEN, "Elsewhere")
    assert {stored["meta"]["folderUid"] for stored in grafana.dashboards.values()} == {"folder-1"}
    assert len(grafana.dashboards) == 4


def test_a_prometheus_datasource_of_any_name_is_left_as_it_is(grafana):
    theirs = {"name": "Mimir", "type": "prometheus", "url": "http://mimir"}
    grafana.datasources.append(dict(theirs))
    push(grafana.url, TOKEN, "Fleet")
    assert grafana.datasources == [theirs]


def test_a_datasource_of_another_type_is_not_enough(grafana):
    grafana.datasources.append({"name": "Loki", "type": "loki", "url": "http://loki"})
    push(grafana.url, TOKEN, "Fleet")
    assert [source["type"] for source in grafana.datasources] == ["loki", "prometheus"]


def test_a_refused_token_is_a_sentence_that_says_which_role_it_needs(grafana):
    with pytest.raises(ProvisionError, match=r"refuses the token: use one of a service account with the role Admin"):
        push(grafana.url, "wrong", "Fleet")


def test_no_grafana_is_a_sentence_and_exit_code_1_on_the_command_line(grafana):
    grafana.stop()
    result = CliRunner().invoke(app, ["push", "--url", grafana.url, "--token", TOKEN, "--folder", "Fleet"])
    assert result.exit_code == 1
    assert f"Grafana at {grafana.url} does not answer: check the address" in result.output


def test_the_push_command_says_what_it_did(grafana):
    result = CliRunner().invoke(app, ["push", "--url", grafana.url, "--token", TOKEN])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0].split() == ["created", "Fleet", "capacity", "/d/trifleet-capacity"]
    assert [folder["title"] for folder in grafana.folders] == ["TriAttention fleet"]
