"""Which processes of this host use the processor.

Clients that were lent weights compute where the executor sees nothing of it, so it looks at their
processes. Knows numbers of processes; knows no clients.
"""

from __future__ import annotations

import time
from collections.abc import Set
from typing import NamedTuple

import psutil

_BUSY_SHARE = 0.05
"""Of one core, over the time between two looks: who waits for input stays below it."""


class _Seen(NamedTuple):
    process: psutil.Process  # which knows that its number has been given to another one
    at_s: float
    used_s: float


class Processes:
    """What has been seen of some processes. Not thread-safe."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def busy(self, pids: Set[int]) -> set[int]:
        """Those of ``pids`` that have used more than a twentieth of a core since the last look, or
        of which that is not known: at a first look, or where the system does not say."""
        before, self._seen = self._seen, {}
        return {pid for pid in pids if self._is_busy(pid, before.get(pid))}

    def _is_busy(self, pid: int, before: _Seen | None) -> bool:
        try:
            process = psutil.Process(pid) if before is None else before.process
            if not process.is_running():
                return True
            used = process.cpu_times()
        except psutil.Error:
            return True
        now = _Seen(process, time.monotonic(), used.user + used.system)
        self._seen[pid] = now
        if before is None:
            return True
        return now.used_s - before.used_s > _BUSY_SHARE * (now.at_s - before.at_s)
