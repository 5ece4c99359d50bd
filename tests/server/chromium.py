"""A browser for tests: headless Chromium, driven over its DevTools protocol (JSON over a websocket, RFC 6455), with the standard library alone.

    with Chromium(folder) as browser, browser.tab() as tab:
        tab.open("http://127.0.0.1:8000/")
        tab.wait_for("document.title === 'dite'")

Every wait has a deadline. The browser's whole process group dies with the `with`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--no-first-run", "--mute-audio")
# It would otherwise look for updates, and for a proxy, on a network that tests don't use.
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server", "--disable-extensions")
START_S = 30.0
CALL_S = 15.0
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), "Space": (" ", 32, " ")}


def find() -> str | None:
    """The browser's path, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """A running browser, its profile in `folder`."""

    def __init__(self, folder: Path):
        command = [find(), *FLAGS, *QUIET, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            self.port = self._port(folder / "DevToolsActivePort", time.monotonic() + START_S)
        except BaseException:
            self.close()
            raise

    def _port(self, file: Path, deadline: float) -> int:
        """The port it chose, which it writes down once it listens."""
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the browser ended at once, with {self.process.returncode}")
            if file.exists() and len(lines := file.read_text().splitlines()) >= 2:
                return int(lines[0])
            time.sleep(0.02)
        raise TimeoutError(f"the browser wrote no {file.name} in {START_S:g} s")

    def tab(self) -> Tab:
        """A new tab, with a session storage of its own."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=CALL_S) as reply:
            return Tab(WebSocket(self.port, json.load(reply)["webSocketDebuggerUrl"].split(str(self.port), 1)[1]))

    def close(self) -> None:
        """Kill it with all its children, and reap it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Tab:
    """A tab. `complaints` are what the console and the network said of the document that is open, `requests` every address that it asked for."""

    def __init__(self, channel: WebSocket):
        self._channel, self._last = channel, 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Run a command of the protocol and return its result. Raises RuntimeError, TimeoutError."""
        self._last += 1
        self._channel.send(json.dumps({"id": self._last, "method": method, "params": params}))
        deadline = time.monotonic() + CALL_S
        while True:
            message = json.loads(self._channel.receive(deadline))
            if message.get("id") == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        kind, facts = message.get("method"), message.get("params", {})
        if kind == "Page.frameNavigated" and "parentId" not in facts["frame"]:
            self.complaints, self.requests = [], []
        elif kind == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.complaints.append(facts["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif kind == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(part.get("value", part.get("description"))) for part in facts["args"]))
        elif kind == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{facts['entry']['text']} {facts['entry'].get('url', '')}")

    def open(self, address: str) -> None:
        """Go there and wait until the document and its scripts are loaded."""
        self.call("Page.navigate", url=address)
        self.wait_for(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression (of JSON's types), promises awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def wait_for(self, condition: str, within_s: float = 8.0) -> Any:
        """Wait until an expression is truthy, and return its value. Raises TimeoutError with what the page says."""
        deadline = time.monotonic() + within_s
        while True:
            if value := self.run(condition):
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {within_s:g} s: {condition}\n{self.run('document.body.innerText')}\n{self.complaints}")
            time.sleep(0.03)

    def press(self, key: str) -> None:
        """Press a key of KEYS as a person does, on whatever has the focus."""
        name, code, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=key, windowsVirtualKeyCode=code, text=text if kind == "keyDown" else "")

    def look(self, width_px: int, dark: bool = False) -> None:
        """Make the window so wide, a telephone's when below 600, and choose its colours."""
        self.call("Emulation.setDeviceMetricsOverride", width=width_px, height=800, deviceScaleFactor=1, mobile=width_px < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, path: Path) -> None:
        """Write the whole page, also what lies below the window, as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Close the tab and its connection."""
        try:
            self.call("Page.close")
        finally:
            self._channel.close()

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class WebSocket:
    """The client's end of a websocket, text messages only."""

    def __init__(self, port: int, path: str):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=CALL_S)
        key = base64.b64encode(os.urandom(16)).decode()
        upgrade = f"Host: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13"
        self._socket.sendall(f"GET {path} HTTP/1.1\r\n{upgrade}\r\n\r\n".encode())
        self._received = b""
        deadline = time.monotonic() + CALL_S
        while b"\r\n\r\n" not in self._received:
            self._read(deadline)
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        if b" 101 " not in head.splitlines()[0]:
            raise RuntimeError(head.decode(errors="replace"))

    def send(self, text: str) -> None:
        """One frame. Clients mask theirs; with a mask of zeros the bytes stay as they are."""
        data = text.encode()
        length = (
            bytes([0x80 | len(data)])
            if len(data) < 126
            else b"\xfe" + len(data).to_bytes(2)
            if len(data) < 2**16
            else b"\xff" + len(data).to_bytes(8)
        )
        self._socket.sendall(b"\x81" + length + bytes(4) + data)

    def receive(self, deadline: float) -> str:
        """The next message, whole. Raises TimeoutError at `deadline`, ConnectionError when the browser has gone."""
        message = b""
        while True:
            first, second = self._take(2, deadline)
            length = second & 0x7F
            if length >= 126:
                length = int.from_bytes(self._take(2 if length == 126 else 8, deadline))
            data = self._take(length, deadline)
            if first & 0x0F == 8:
                raise ConnectionError("the browser closed the connection")
            if first & 0x0F < 3:  # neither ping nor pong
                message += data
                if first & 0x80:
                    return message.decode()

    def _take(self, count: int, deadline: float) -> bytes:
        while len(self._received) < count:
            self._read(deadline)
        taken, self._received = self._received[:count], self._received[count:]
        return taken

    def _read(self, deadline: float) -> None:
        if (left_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError("the browser doesn't answer")
        self._socket.settimeout(left_s)
        if not (data := self._socket.recv(2**16)):
            raise ConnectionError("the browser closed the connection")
        self._received += data

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
