"""
A headless Chromium for the tests, driven over a pipe by its DevTools protocol; it needs no package of Python.

why a pipe: --remote-debugging-pipe reads json from file 3 and writes to file 4, each message ended by a zero
byte. The other way, a port, needs a WebSocket.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time

SECONDS = 60  # for an answer
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# why no sandbox: as root, which a container's user is, Chromium starts without one only
FLAGS = "--headless=new --no-sandbox --no-zygote --disable-gpu --in-process-gpu --disable-dev-shm-usage"
FLAGS += " --disable-extensions --disable-background-networking --no-first-run --hide-scrollbars"
FLAGS += " --disable-crash-reporter --remote-debugging-pipe --force-device-scale-factor=1"
KEYS = {"ArrowDown": 40, "ArrowRight": 39, "Escape": 27, "Enter": 13}


class Browser:
    """One page. What it writes to the console as an error, and what it throws, is kept in `errors`."""

    def __init__(self, profile):
        self.errors, self.requests = [], []
        self.numbers, self.buffer = itertools.count(1), b""
        to_browser, self.writing = os.pipe()
        self.reading, from_browser = os.pipe()
        # the shell gives both pipes the numbers that Chromium expects
        command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        argv = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pipes = (to_browser, from_browser)
        self.process = subprocess.Popen(["bash", "-c", command, *argv], pass_fds=pipes, **silent)
        os.close(to_browser)
        os.close(from_browser)
        self.session = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Send a command and return its result; note the events that come before it."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self, method):
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reading], [], [], max(0, end - time.monotonic()))
            assert ready, f"{method}: no answer of Chromium within {SECONDS} s"
            piece = os.read(self.reading, 1 << 20)
            assert piece, f"{method}: Chromium ended with {self.process.poll()}"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:500])
        if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        if event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(json.dumps(parameters["args"])[:500])
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def size(self, width, height, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        # why: a page that still scrolls smoothly moves away under a click
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, still])

    def open(self, url, ready):
        """Load a page, and wait until the expression `ready` is true in it."""
        self.call("Page.navigate", url=url)
        self.wait(ready)

    def wait(self, expression):
        end = time.monotonic() + SECONDS
        while not self.js(expression):
            assert time.monotonic() < end, f"not true within {SECONDS} s: {expression}; {self.errors}"
            time.sleep(0.05)

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, json.dumps(result["exceptionDetails"])[:500]
        return result["result"].get("value")

    def click(self, selector):
        """Click with the mouse in the middle of the first element of a selector."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{find}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        middle = "({x, y, width, height}) => [x + width / 2, y + height / 2]"
        middle = f"({middle})({find}.getBoundingClientRect())"
        # why: on a busy machine the page may still be laid out, and a click would hit a neighbour
        drawn = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        box, before = self.js(middle), None
        while box != before:
            self.js(drawn)
            box, before = self.js(middle), box
        self.wait(f"{find}.contains(document.elementFromPoint(...{middle}))")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key):
        parameters = {"key": key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        if key not in KEYS:
            parameters["text"] = key
        elif key == "Enter":
            parameters["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", **parameters)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(image["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.reading)
        os.close(self.writing)
