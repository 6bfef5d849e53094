"""Runs many cases, each in a child process of its own: a crash or a hang ends one case only.

Children are forked from a process that has the libraries imported but has computed nothing.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .catalogue import Case
from .compare import Record, compare

Result = dict[str, Any]


def sweep(cases: list[Case], folder: Path, *, jobs: int, limit_s: float) -> Iterator[Result]:
    """The result of each case as it becomes known; each is also a JSON file in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    waiting, running = list(cases), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            path = folder / f"{case.name.replace('/', '--')}.json"
            path.unlink(missing_ok=True)
            child = context.Process(target=_child, args=(case, path))
            child.start()
            running[case] = (child, path, time.monotonic())
        for case, (child, path, started_s) in list(running.items()):
            child.join(0.05)
            late = time.monotonic() - started_s > limit_s
            if child.is_alive() and not late:
                continue
            if child.is_alive():
                child.kill()
                child.join()
            del running[case]
            if not path.exists():
                reason = f"took more than {limit_s:.0f} s" if late else f"exit {child.exitcode}"
                _write(path, Record(case.name, case.family, not_run=f"the run ended: {reason}"))
            yield json.loads(path.read_text())


def load(folder: Path, names: set[str]) -> dict[str, Result]:
    """Results of earlier runs, by name."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {result["name"]: result for result in found if result["name"] in names}


def _child(case: Case, path: Path) -> None:
    torch.set_num_threads(1)
    _write(path, compare(case))


def _write(path: Path, record: Record) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(record), indent=1))
    new.rename(path)
