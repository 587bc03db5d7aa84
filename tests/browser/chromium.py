"""Drives a Chromium without a window by DevTools messages over a pipe: JSON that ends with a zero byte."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A stranger's name that leads to this machine, as one does whose address its owner has just changed.
REBOUND = "rebound.example"
_DEADLINE_SECONDS = 240.0


def executable() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """Runs a Chromium. `close()` ends it. events: those of the open page so far, as the protocol names them."""

    def __init__(self) -> None:
        program = executable()
        assert program, "no Chromium"
        self.events: list[dict[str, Any]] = []
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={self._profile.name}", "--disable-component-update", "--no-first-run"]
        options += [f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"]
        self._process = subprocess.Popen(
            # Chromium reads commands from descriptor 3 and answers on 4.
            ["bash", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{answers}', program, *options],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._target: str | None = None

    def open(self, url: str, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Open a new page and wait for its load event. `events` then has those of this page alone."""
        self._session = None
        if self._target:
            self.call("Target.closeTarget", targetId=self._target)
        self.events.clear()
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.until(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events), f"loading {url}")

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression. Wait for it when it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.until(lambda: self.value(f"Boolean({expression})"), expression)

    def complaints(self) -> list[str]:
        """Return the errors and warnings of the console, the exceptions, and the violated policies."""
        found = []
        for event in self.events:
            match event["method"], event["params"]:
                case "Runtime.exceptionThrown", params:
                    found.append(json.dumps(params["exceptionDetails"])[:2000])
                case "Log.entryAdded", params if params["entry"]["level"] in ("error", "warning"):
                    found.append(json.dumps(params["entry"])[:2000])
                case "Runtime.consoleAPICalled", params if params["type"] in ("error", "warning", "assert"):
                    found.append(json.dumps(params["args"])[:2000])
        return found

    def requests(self) -> list[str]:
        """Return the URLs that the page asked for, its own included."""
        return [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]

    def statuses(self, port: int) -> list[tuple[str, int]]:
        """Return path and status of every answer from this port, also of those that the page may not see.

        Answers to preflight requests are left out.
        """
        answers = [event["params"] for event in self.events if event["method"] == "Network.responseReceived"]
        found = [one["response"] for one in answers if one["type"] != "Preflight"]
        return [(urlsplit(one["url"]).path, one["status"]) for one in found if urlsplit(one["url"]).port == port]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        give_up = time.monotonic() + _DEADLINE_SECONDS
        while True:
            answer = self._receive(give_up, method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close")
        finally:
            os.close(self._to)
            os.close(self._from)
            self._process.wait(_DEADLINE_SECONDS)
            self._profile.cleanup()

    def until(self, done: Any, what: str) -> None:
        """Wait until `done()` is true. Events of the page are received meanwhile."""
        give_up = time.monotonic() + _DEADLINE_SECONDS
        while not done():
            assert time.monotonic() < give_up, f"{what}: not within {_DEADLINE_SECONDS:g} s; {self.complaints()}"
            self.call("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 20))", awaitPromise=True)

    def _receive(self, give_up: float, what: str) -> dict[str, Any]:
        """Return the next message. Events of the open page are kept."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, give_up - time.monotonic()))
            assert ready, f"{what}: no answer within {_DEADLINE_SECONDS:g} s"
            part = os.read(self._from, 1 << 20)
            assert part, f"Chromium ended during {what}"
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message and message.get("sessionId") == self._session:
            self.events.append(message)
        return message
