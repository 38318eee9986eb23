"""docs/images/serve.png: the status page of a server under load, as headless Chromium draws it.

    python scripts/picture_status.py [--check]

Starts a server with the embedded model, lets clients talk to it, and takes the picture. `--check` writes
nothing and fails unless the page has drawn its charts. Needs Chromium.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "serve.png"
PORT = 8711
SECONDS = 45
CLIENTS = 6
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"none of {', '.join(BROWSERS)} is installed", file=sys.stderr)
        return 2
    url = f"http://127.0.0.1:{PORT}"
    command = [sys.executable, "-m", "tqai", "serve", "--port", str(PORT), "--max-kv-memory", "8MiB"]
    server = subprocess.Popen([*command, "--max-running", "4"])
    try:
        wait_for(url)
        stop = threading.Event()
        clients = [threading.Thread(target=talk, args=(url, n, stop), daemon=True) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        drawn = draw(browser, url)
        stop.set()
        for client in clients:
            client.join(120)
    finally:
        server.terminate()
        server.wait(120)
    if not check:
        PICTURE.write_bytes(drawn)
        print(f"wrote {PICTURE.relative_to(ROOT)}, {len(drawn)} bytes")
    return 0


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def talk(url: str, number: int, stop: threading.Event) -> None:
    text = (ROOT / "src/tqai/demo/document.txt").read_text("utf-8")
    turn = 0
    while not stop.is_set():
        start = 7000 * (number % 3)
        prompt = text[start : start + 2500 + 900 * (turn % 4)]
        body = {"model": "tqai-demo", "prompt": prompt, "max_tokens": 60 + 20 * number, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
        turn += 1


def draw(browser: str, url: str) -> bytes:
    """A picture of the page after `SECONDS`; raises AssertionError where its charts stayed empty."""
    with tempfile.TemporaryDirectory() as folder, Page(browser, url, folder) as page:
        time.sleep(SECONDS)
        state = page.evaluate("document.getElementById('state').textContent")
        points = page.evaluate(
            "document.getElementById('plot-speed').getAttribute('points').split(' ').length"
        )
        assert state == "serving", f"the page says {state!r}"
        assert points > SECONDS / 3, f"{points} points drawn"
        assert page.evaluate("before.counters.generated_tokens") > 0
        return page.picture()


class Page:
    """A page in a headless browser, driven through its debugging pipe (JSON texts that end with a 0 byte)."""

    def __init__(self, browser: str, url: str, folder: str) -> None:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        options = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"
        options += f" --user-data-dir={folder}"
        line = f"exec {browser} {options} about:blank 3<&{to_browser} 4>&{from_browser} 2>/dev/null"
        self._process = subprocess.Popen(["bash", "-c", line], pass_fds=(to_browser, from_browser))
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._read = 0, b""
        self._session: str | None = None
        target = self._send("Target.createTarget", {"url": url})["targetId"]
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})[
            "sessionId"
        ]
        size = {"width": 1120, "height": 530, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", size)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self._send("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["text"])
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self._send("Page.captureScreenshot", {"format": "png"})["data"])

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)

    def _send(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._read:
                more = os.read(self._from, 1 << 16)
                if not more:
                    raise RuntimeError("the browser has ended")
                self._read += more
            text, _, self._read = self._read.partition(b"\0")
            found = json.loads(text)
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(found["error"]["message"])
                return found["result"]


if __name__ == "__main__":
    sys.exit(main())
