"""A headless chromium by WebDriver over plain HTTP: enough to click, type and ask."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
#: WebDriver's names of keys.
TAB, ENTER, SPACE, RIGHT = "\ue004", "\ue007", " ", "\ue014"


class Browser:
    """One window. `close` ends both processes."""

    def __init__(self, folder: Path) -> None:
        command = [str(DRIVER), "--port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        port = next(line.rsplit(" ", 1)[1].strip(" .\n") for line in self.process.stdout if "started" in line)
        self.at = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        found = self._send("", {"capabilities": {"alwaysMatch": wanted}})
        self.at += f"/{found['sessionId']}"

    def _send(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.at + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, path: Path, fragment: str = "") -> None:
        self._send("/url", {"url": "about:blank"})  # else a fragment alone would load nothing
        self._send("/url", {"url": path.resolve().as_uri() + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns; a promise is awaited."""
        return self._send("/execute/sync", {"script": script, "args": arguments})

    def click(self, selector: str) -> None:
        self._send(f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self._send(f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def choose(self, selector: str, value: str) -> None:
        """An option of a select, as a user's choice."""
        script = "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
        self.run(
            script + "for (const e of ['input', 'change']) s.dispatchEvent(new Event(e, {bubbles: true}))",
            selector,
            value,
        )

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def wait(self, condition: str, seconds: float = 5) -> Any:
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {condition}")):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)
        return found

    def size(self, width: int, height: int, scheme: str = "light") -> None:
        """The window as a device's, in the colours that its user prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._send("/screenshot", method="GET")))

    def complaints(self) -> list[str]:
        """Errors of the console since the last call, a refused request among them."""
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def close(self) -> None:
        try:
            self._send("", method="DELETE")
        finally:
            self.process.terminate()
            self.process.wait()

    def _devtools(self, command: str, **parameters: Any) -> None:
        self._send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _find(self, selector: str) -> str:
        return str(next(iter(self._send("/element", {"using": "css selector", "value": selector}).values())))
