"""Runs a soak: starts clients and kills some, kills the executor, and checks what must hold."""

from __future__ import annotations

import collections
import dataclasses
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import psutil

import tiny_files
from soak.clients import BAD, GOOD, Finding, Task, main

AT_ONCE = 6
_MEMORY_SLACK = 48 << 20


@dataclasses.dataclass
class Report:
    """What happened, and what should not have."""

    seconds: float = 0.0
    cycles: int = 0
    clients: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    clients_killed: int = 0
    executors_killed: int = 0
    exchanges: int = 0
    deviation: float = 0.0
    latencies_s: list[float] = dataclasses.field(default_factory=list)
    memory: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """Process and resident bytes of the executor, whenever nobody is there."""
    descriptors: list[int] = dataclasses.field(default_factory=list)
    violations: list[str] = dataclasses.field(default_factory=list)

    def percentile_s(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0.0

    def __str__(self) -> str:
        clients = ", ".join(f"{count} {role}" for role, count in sorted(self.clients.items()))
        first, last = self.memory[0][1] / 1e6, self.memory[-1][1] / 1e6
        lines = [
            f"{self.seconds:.0f} s in {self.cycles} cycles; {sum(self.clients.values())} clients "
            f"({clients}), of which {self.clients_killed} were killed; the executor was killed "
            f"{self.executors_killed} times",
            f"{self.exchanges:,} exchanges of clients that compare; largest deviation from the "
            f"plain model {self.deviation:.2g} (alone: none)",
            f"one product and its way: p50 {1e3 * self.percentile_s(0.5):.1f} ms, p99 "
            f"{1e3 * self.percentile_s(0.99):.1f} ms, longest "
            f"{1e3 * self.percentile_s(1.0):.0f} ms, of {len(self.latencies_s)}",
            f"executor's resident memory {first:.0f} MB at first, {last:.0f} MB at last; "
            f"descriptors {self.descriptors[0]} and {self.descriptors[-1]}",
            f"{len(self.violations)} violations",
        ]
        return "\n".join([*lines, *self.violations])


class Soak:
    """One executor under supervision, and the clients of the moment."""

    def __init__(self, folder: Path, seed: int, log: TextIO) -> None:
        self.report = Report()
        self._random = random.Random(seed)
        self._log = log
        self._model = tiny_files.build_model(folder / "model")
        self._urls = [f"unix://{folder}/base.sock"]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["soak.clients"])
        self._running: list[tuple[BaseProcess, Connection, Task]] = []
        command = [
            sys.executable, "-m", "symbiosis.cli.main", "serve", str(self._model), "--supervise",
            "--threads", "1", "--listen", self._urls[0], "--listen", "tcp://127.0.0.1:0",
        ]  # fmt: skip
        self._errors = (folder / "executor.log").open("w+")
        self._server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if "tcp://" in line:
                self._urls.append(line.split()[1])
            if line == "ready\n":
                break
        self._supervisor = psutil.Process(self._server.pid)

    def run(self, seconds: float, cycle_s: float) -> Report:
        """Cycles of work, each followed by a moment in which nobody is there."""
        began_s = time.monotonic()
        self._quiet()
        while (left_s := began_s + seconds - time.monotonic()) > 0:
            self._work(min(cycle_s, left_s))
            self._quiet()
            self.report.cycles += 1
            self.report.seconds = time.monotonic() - began_s
            print(f"{self.report.seconds:.0f} s: {self._state()}", file=self._log, flush=True)
        self._check_memory()
        self._stop()
        return self.report

    def _work(self, seconds: float) -> None:
        """Clients come and go; in every other cycle the executor dies somewhere on the way."""
        began_s = time.monotonic()
        dies_s = began_s + self._random.uniform(0.3, 0.7) * seconds
        dies = self.report.cycles % 2 == 0
        while time.monotonic() < began_s + seconds:
            self._collect(0.02)
            if len(self._running) < AT_ONCE:
                self._start(self._random.choice([*GOOD, *GOOD, *BAD]))
            if self._running and self._random.random() < 0.01:
                self._kill_one()
            if dies and time.monotonic() > dies_s:
                dies = False
                self._executor().kill()
                self.report.executors_killed += 1

    def _quiet(self) -> None:
        """Wait for all; then alone the answers are right to the bit, and nothing is left."""
        deadline_s = time.monotonic() + 120
        while self._running and time.monotonic() < deadline_s:
            self._collect(0.1)
        for process, _, task in self._running:
            self._violation(f"{task.role} {task.seed} did not end")
            process.kill()
        self._start("lone")
        while self._running:
            self._collect(0.1)
        self._wait_until_alone()
        executor = self._executor()
        self.report.memory.append((executor.pid, executor.memory_info().rss))
        self.report.descriptors.append(executor.num_fds())
        if self.report.descriptors[-1] != self.report.descriptors[0]:
            self._violation(f"descriptors: {self.report.descriptors}")

    def _wait_until_alone(self) -> None:
        from symbiosis import connect

        deadline_s = time.monotonic() + 10
        with connect(self._urls[0], arena_bytes=0) as session:
            while (left := session.executor_stats())["clients"].keys() != {
                str(session.welcome["session"])
            } or left["waiting"]:
                if time.monotonic() > deadline_s:
                    self._violation(f"left behind: {left['clients']}, {left['waiting']} waiting")
                    break
                time.sleep(0.01)
        time.sleep(0.1)  # it notices that we have gone

    def _start(self, role: str) -> None:
        url = self._random.choice(self._urls)
        arena_bytes = self._random.choice((0, 1 << 30))
        task = Task(role, url, self._model, self._random.randrange(1 << 30), arena_bytes)
        theirs, ours = self._context.Pipe(duplex=False)
        process = self._context.Process(target=main, args=(task, ours), daemon=True)
        process.start()
        ours.close()
        self._running.append((process, theirs, task))
        self.report.clients[role] += 1

    def _kill_one(self) -> None:
        process, found, _ = self._running.pop(self._random.randrange(len(self._running)))
        process.kill()
        process.join()
        found.close()
        self.report.clients_killed += 1

    def _collect(self, wait_s: float) -> None:
        """Take what clients have found that are done."""
        connections = [found for _, found, _ in self._running]
        ready = multiprocessing.connection.wait(connections, wait_s) if connections else []
        if not connections:
            time.sleep(wait_s)
        for item in [item for item in self._running if item[1] in ready]:
            process, found, task = item
            self._running.remove(item)
            try:
                self._take(found.recv(), task)
            except EOFError:
                self._violation(f"{task.role} {task.seed} ended without a word")
            found.close()
            process.join()

    def _take(self, finding: Finding, task: Task) -> None:
        report = self.report
        report.exchanges += finding.exchanges
        report.deviation = max(report.deviation, finding.deviation)
        report.latencies_s += finding.latencies_s
        if finding.error:
            self._violation(f"{task}: {finding.error}")

    def _check_memory(self) -> None:
        """Of each executor, from the first moment of rest after its first work to its last."""
        by_process: dict[int, list[int]] = {}
        for pid, resident in self.report.memory:
            by_process.setdefault(pid, []).append(resident)
        for pid, found in by_process.items():
            worked = found[1:] if len(found) > 2 else found
            if worked[-1] > worked[0] + _MEMORY_SLACK:
                grown = [f"{resident / 1e6:.0f}" for resident in found]
                self._violation(f"executor {pid} has grown: {', '.join(grown)} MB")

    def _executor(self) -> psutil.Process:
        while not (children := self._supervisor.children()):
            time.sleep(0.01)
        return children[0]

    def _stop(self) -> None:
        self._server.send_signal(signal.SIGTERM)
        if self._server.wait(60) != 0:
            self._violation(f"the executor ended with code {self._server.returncode}")
        self._errors.seek(0)
        said = self._errors.read()
        self._errors.close()
        assert self._server.stdout is not None
        self._server.stdout.close()
        for word in ("internal error", "Traceback"):
            if word in said:
                at = said.index(word)
                self._violation(f"in the executor's log: {said[max(0, at - 300) : at + 1500]}")
        if os.path.exists(self._urls[0].removeprefix("unix://")):
            self._violation("the socket file is left")

    def _state(self) -> str:
        pid, resident = self.report.memory[-1]
        return (
            f"{sum(self.report.clients.values())} clients, {self.report.exchanges:,} exchanges, "
            f"executor {pid} with {resident / 1e6:.0f} MB, {len(self.report.violations)} violations"
        )

    def _violation(self, text: str) -> None:
        self.report.violations.append(text)
        print(f"VIOLATION {text}", file=self._log, flush=True)
