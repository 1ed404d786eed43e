"""Debian's Chromium without a window, driven by the DevTools protocol: enough of it to open, press, ask and look."""

import base64
import contextlib
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.observability.debian import tool

START_SECONDS = 60.0
WAIT_SECONDS = 20.0


class Tab:
    """One page of the browser. Scripts run in it as a person's console would run them."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """Errors and warnings on the console, and exceptions nobody caught."""
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_SECONDS))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._listen(message)

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def look_as(self, width: int, height: int, scheme: str = "light", motion: str = "no-preference") -> None:
        """Size in CSS pixels, `prefers-color-scheme` and `prefers-reduced-motion`."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.send("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's when it is one. Fails where the script throws."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"].get("description")
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}; console: {self.complaints}"
            time.sleep(0.05)

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key, by its name and its Windows virtual-key code."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    def screenshot(self, file: Path, whole: bool = True) -> None:
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))

    def _listen(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(parameters["exceptionDetails"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.complaints.append(str([argument.get("value") for argument in parameters["args"]]))
        elif message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])


@contextmanager
def running_chromium() -> Iterator[Tab]:
    """A browser of its own with one empty tab; gone with its profile at the end. Raises `ProgramMissing`."""
    binary = tool("chromium", "chromium")
    with tempfile.TemporaryDirectory(prefix="trifleet-chromium-", ignore_cleanup_errors=True) as folder:
        flags = [
            "--headless=new",
            "--no-sandbox",  # tests may run as root, where Chromium's own sandbox does not start
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
        ]
        log = Path(folder, "chromium.log")
        with log.open("w") as output:
            process = subprocess.Popen([binary, *flags, "about:blank"], stdout=output, stderr=subprocess.STDOUT)
        try:
            with connect(_tab_address(folder, process, log), max_size=None) as socket:
                yield Tab(socket)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            process.wait()


def _tab_address(folder: str, process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Chromium writes the port that it chose into its profile."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, f"Chromium did not start: {log.read_text()}"
        assert time.monotonic() < deadline, f"Chromium is not ready: {log.read_text()}"
        with contextlib.suppress(OSError, httpx.HTTPError, IndexError, StopIteration):
            port = Path(folder, "DevToolsActivePort").read_text().splitlines()[0]
            tabs = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
            return next(str(tab["webSocketDebuggerUrl"]) for tab in tabs if tab["type"] == "page")
        time.sleep(0.1)
