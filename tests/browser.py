"""A headless Chromium that tests drive through the DevTools protocol. Standard library only.

`python -m tests.browser FILE.html OUT.png STEP` takes a picture of a replay at a step; docs/images are made so.

Source   https://chromedevtools.github.io/devtools-protocol; with --remote-debugging-pipe Chromium reads commands from
         file descriptor 3 and answers on 4, one JSON text per message, each ended by a zero byte
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# fmt: off
NAMES = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
QUIET = (  # a closed network is no error of ours, and nothing is fetched
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--no-first-run", "--no-default-browser-check",
)
# fmt: on
PATIENCE = 60  # seconds for one answer, on a busy machine


def find_browser() -> str | None:
    """DGEMMA_BROWSER where it is set, else the first Chromium or Chrome there is."""
    asked = os.environ.get("DGEMMA_BROWSER")
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One process with one tab. Use as a context manager. `folder` is its profile's."""

    def __init__(self, program: str, folder):
        self._last, self._buffer, self._session, self.events = 0, b"", None, []
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # The child's ends go out of the way of 3 and 4 first, which they must become.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium refuses root a sandbox
        options = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", *root, *QUIET]
        self._process = subprocess.Popen(
            [program, *options, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: [os.dup2(end, wanted) for end, wanted in zip(ends, (3, 4), strict=True)],
            pass_fds=(3, 4),
        )
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)

    def __enter__(self):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self._session = None
        with contextlib.suppress(Exception):
            self.send("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def send(self, method: str, **parameters) -> dict:
        """One command's result; what happens meanwhile is kept in `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda m: m.get("id") == self._last)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, url: str) -> None:
        """Load a page; returns once it has run its scripts."""
        for each in ("about:blank", url):  # the blank one, because another #place in the same page loads nothing
            self.events.clear()
            self.send("Page.navigate", url=each)
            if not any(event["method"] == "Page.loadEventFired" for event in self.events):
                self._until(lambda m: m.get("method") == "Page.loadEventFired")

    def js(self, expression: str):
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        code = {" ": 32, "Home": 36, "End": 35, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}.get(key, ord(key[0]))
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            parameters = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
            self.send("Input.dispatchKeyEvent", type=kind, **parameters, **(text if kind == "keyDown" else {}))

    def point(self, selector: str, click: bool = False) -> None:
        """Move the pointer to the middle of an element."""
        find = f"document.querySelector({json.dumps(selector)})"
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({find}.getClientRects()[0])")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def look(self, width: int, height: int, **media: str) -> None:
        """The window's size, and media features: prefers_color_scheme="dark"."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[dict]:
        """Errors and warnings of the console since the page was opened."""
        methods = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [event for event in self.events if event["method"] in methods]

    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def _until(self, wanted):
        """The next message that is `wanted`; the events before it are kept."""
        deadline = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self._buffer:
                left = deadline - time.monotonic()
                assert left > 0 and select.select([self._in], [], [], left)[0], "the browser does not answer"
                part = os.read(self._in, 1 << 16)
                assert part, "the browser went away"
                self._buffer += part
            raw, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(raw)
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message


def main(page: str, picture: str, step: str = "1") -> int:
    program = find_browser() or sys.exit("found no Chromium or Chrome; install one or name it in DGEMMA_BROWSER")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Browser(program, folder) as browser:
        browser.look(1200, 800, prefers_color_scheme="light", prefers_reduced_motion="reduce")
        browser.open(f"{Path(page).absolute().as_uri()}#{step}")
        browser.look(1200, 40 + browser.js("Math.ceil(document.querySelector('main').getBoundingClientRect().bottom)"))
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(picture).write_bytes(browser.screenshot())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
