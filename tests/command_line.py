"""Processes of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

COMMAND = (sys.executable, "-m", "symbiosis.cli.main")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error is; there must be no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("symbiosis: error: ")]
        assert self.code == 1, self
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0])
        assert "Traceback" not in self.err
        return lines[0].removeprefix("symbiosis: error: ")


def start(*args: object) -> subprocess.Popen[str]:
    """A real process of the command line."""
    return subprocess.Popen(
        [*COMMAND, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


def run(*args: object) -> Outcome:
    return finish(start(*args))


class Served(NamedTuple):
    process: subprocess.Popen[str]
    lines: list[str]
    """What it has printed, up to ``ready``."""
    unix: str
    tcp: str


def serve(model: Path, folder: Path, *options: object) -> Served:
    """`symbiosis serve` on a UNIX socket and a TCP port, ready."""
    unix = f"unix://{folder}/base.sock"
    process = start(
        "serve", model, "--listen", unix, "--listen", "tcp://127.0.0.1:0", "--threads", 1, *options
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if lines[-1] == "ready":
            break
    watchdog.cancel()
    if lines[-1:] != ["ready"]:
        raise AssertionError(finish(process))
    (tcp,) = (line.split()[1] for line in lines if "tcp://" in line)
    return Served(process, lines, unix, tcp)
