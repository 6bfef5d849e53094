"""Executors as processes of their own, which can be killed, stopped and started again."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

COMMAND = (sys.executable, "-m", "symbiosis.cli.main")
_numbers = itertools.count(1)


class Base:
    """``symbiosis serve`` on one UNIX socket."""

    def __init__(self, model: Path, folder: Path, *options: object) -> None:
        self.url = f"unix://{folder}/base-{next(_numbers)}.sock"
        self._args = ["serve", model, "--listen", self.url, "--threads", 1, *options]
        self.start()

    def start(self) -> None:
        """Returns when it serves."""
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, self._args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        said = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said.append(line)
            if line == "ready\n":
                break
        watchdog.cancel()
        assert said[-1:] == ["ready\n"], "".join(said)

    def kill(self) -> None:
        """As ``kill -9``."""
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def stopped(self):  # type: ignore[no-untyped-def]
        """It is there and says nothing."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)  # until then its threads run on
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
