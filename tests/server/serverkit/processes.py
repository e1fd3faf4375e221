"""Servers in processes of their own, as users start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KIT_FOLDER = str(Path(__file__).parent.parent)
DEADLINE = 60.0  # seconds for what must happen; a failure then, not a hang


def kit_environment(**more: str) -> dict[str, str]:
    """The environment for processes that import serverkit."""
    path = os.pathsep.join([KIT_FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {DEADLINE} s"
        time.sleep(0.02)


class Server:
    """`python -m MODULE ARGS…`, ready when constructed. What it wrote to stderr is in `log`."""

    def __init__(self, module: str, args: Sequence[str], **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=kit_environment(**environment),
        )
        self._log: list[str] = []
        self._drainer = threading.Thread(target=self._drain, daemon=True)
        self._drainer.start()
        self.url = self._wait_for_url()

    @property
    def log(self) -> str:
        return "".join(self._log)

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self._log.extend(iter(self.process.stderr.readline, ""))

    def _wait_for_url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Ready: "):
                return line.removeprefix("Ready: ").strip()
        self.process.wait()
        self._drainer.join()
        raise AssertionError(f"The server ended with {self.process.returncode}:\n{self.log}")

    def request(
        self, method: str, path: str, body: Any = None, *, data: bytes | None = None, key: str | None = None
    ) -> tuple[int, Any]:
        """(status, decoded JSON or text)."""
        payload = json.dumps(body).encode() if body is not None else data
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url + path, payload, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                return response.status, _decode(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _decode(error.read())

    def engine_pid(self) -> int:
        """Of its engine process: its only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])

    def gauge(self, name: str) -> float:
        """The value of a metric that has no other labels than model_name."""
        _, text = self.request("GET", "/metrics")
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))

    def stop(self) -> int:
        """SIGTERM, then its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def _decode(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()
