"""A browser without a window, driven through a pipe by its own protocol: no driver, no network."""

from __future__ import annotations

import base64
import copy
import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


#: Longest silence of the browser.
SECONDS = 60

NAMES = ("/layers.0/fc1/MatMul", "/layers.0/fc2/MatMul")

DOCUMENT: dict[str, Any] = {
    "model": "input.onnx", "output": "small.onnx", "target": "cpu", "pipeline": "tidy,choose-layout,lower-sparse",
    "bytes_before": 5_000_000, "bytes_after": 2_000_000,
    "latency": {
        "before_ms": 2.0, "after_ms": 1.0, "speedup": 2.0, "threads": 2,
        "before": {"min": 1.9, "q1": 1.95, "median": 2.0, "q3": 2.1, "max": 2.4},
        "after": {"min": 0.95, "max": 1.3, "median": 1.0},
    },
    "max_rel_l2": 2e-7, "rel_l2_to_input": 0.02,
    "sites": [
        {"site": NAMES[0], "op": "MatMul", "shape": [64, 32], "density": 0.2, "layout": "16x1", "reason": "16x1 wins"},
        {"site": NAMES[1], "op": "MatMul", "shape": [32, 64], "density": 1.0, "layout": "dense", "reason": "no zeros"},
        {"site": "head", "op": "Gemm", "shape": [8, 32], "density": 1.0, "layout": "dense", "reason": "small"},
    ],
    "passes": [
        {
            "pass": "lower-sparse", "spec": "lower-sparse",
            "changed": [{"site": "head", "detail": "d", "numbers": {"dense_ms": 0.1, "dense_bytes": 1024}}],
            "skipped": [{"site": NAMES[1], "reason": "no sparse layout was chosen"}], "notes": ["one note"],
            "seconds": 0.25,
        }
    ],
    "notes": ["timed on synthetic inputs"],
    "not_sites": [{"name": "scores", "reason": "both operands are computed at run time"}],
    "operator_library": True,
    "items": [
        {
            "name": name, "sites": [name, *extra], "chosen": chosen,
            "candidates": [
                {"name": "dense", "ms": 0.4, "source": "measured", "spread": 0.02, "bytes": 8192, "error": 0,
                 "damage": 0},
                {"name": "prune-alps{pattern=16x1 sparsity=0.8}", "ms": 0.1, "bytes": 1800, "error": 0.1,
                 "damage": 0.01},
                {"name": "quantize", "ms": 0.2, "source": "interpolated", "bytes": 2048, "error": 0.02, "damage": 0.001,
                 "custom_ops": True, "note": "the budget forbids it"},
            ],
            "dropped": [
                {"name": f"factor-rrr{{param-ratio=0.{at}}}", "ms": 0.5, "note": "as slow as the dense layer"}
                for at in range(1, 9)
            ],
        }
        for name, extra, chosen in ((NAMES[0], ["tied"], 1), (NAMES[1], [], 0))
    ],
    "front": [
        {"ms": 2.0, "bytes": 5_000_000, "damage": 0, "input": True},
        {"ms": 1.1, "bytes": 2_000_000, "damage": 0.01, "chosen": True},
        {"ms": 0.7, "bytes": 1_000_000, "damage": 0.08},
    ],
    "front_bytes": [
        {"ms": 2.0, "bytes": 5_000_000, "damage": 0, "input": True},
        {"ms": 1.1, "bytes": 2_000_000, "damage": 0.01, "chosen": True},
        {"ms": 1.9, "bytes": 700_000, "damage": 0.05},
    ],
    "predicted": {"ms": 1.1, "bytes": 2_000_000, "damage": 0.01},
    "budgets": [{"kind": "ms", "limit": 1.2, "asked": "0.5x", "met": True}],
    "metric": {
        "name": "accuracy", "before": 0.9, "after": 0.895, "max_drop": 0.01, "held": True,
        "steps": [
            {"change": "the point that the budget allows", "ms": 0.9, "bytes": 1_500_000, "value": 0.87, "held": False},
            {"change": f"{NAMES[0]}: back to 16x1", "ms": 1.0, "value": 0.895, "held": True},
        ],
    },
    "sensitivity": [
        {
            "name": NAMES[0], "chosen_error": 0.1,
            "points": [{"error": 0.02, "drop": 0.001, "measured": True}, {"error": 0.3, "drop": 0.05, "label": "16x1"}],
        }
    ],
    "spectra": [{"site": NAMES[0], "values": [1, 0.5, 0.25, 0.01], "count": 32, "rank": 3}],
    "thumbnails": [
        {
            "site": NAMES[0], "shape": [64, 32], "layout": "16x1", "density": 0.2,
            "grid": [[0.1, 0.4], [0, 0.3]], "corner": [[1, 0], [0, 1]],
        }
    ],
    "partition": [{"name": NAMES[0], "op": "BlockSparseMatMul", "part_work": [10, 6], "lambda": 1.25}],
    "effort": {"planning_seconds": 60.0, "planning_predicted": 50.0, "making_seconds": 30.0, "model_predicted": 12.0,
               "models": 3, "bytes": 400_000_000, "bytes_predicted": 300_000_000},
    "provenance": {
        "version": "0.1.0", "seed": 0, "command": "sparsecc optimize input.onnx -o small.onnx",
        "digests": {"input": "ab" * 32}, "machine": {"cpu": "a processor", "cores": 2}, "libraries": {"numpy": "2"},
    },
}  # fmt: skip


class Browser:
    """One page of one browser.

    Attributes:
        events: what the browser has told so far.
    """

    def __init__(self, command: str, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            [
                "bash", "-c", script, command, "--headless", "--no-sandbox", "--disable-gpu",
                "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._number, self._session = b"", 0, ""
        (target,) = (item for item in self.call("Target.getTargets")["targetInfos"] if item["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; what comes in between is kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def wait(self, method: str) -> None:
        """Wait for an event, unless it has been there."""
        while all(event.get("method") != method for event in self.events):
            self.events.append(self._next())

    def open(self, path: Path, width: int, *, dark: bool = False, media: str = "") -> None:
        """Load a file at a width of so many CSS pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            assert ready, f"the browser said nothing for {SECONDS} seconds"
            more = os.read(self._in, 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless browser; tests are skipped where there is none."""
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    if command is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    try:
        found = Browser(command, tmp_path_factory.mktemp("browser"))
    except (AssertionError, OSError) as error:
        pytest.skip(f"{command} does not start: {error}")
    yield found
    found.close()


@pytest.fixture
def document() -> Callable[[], dict[str, Any]]:
    """A small run document with every part; each call gives a new one."""
    return lambda: copy.deepcopy(DOCUMENT)
