"""What an executor has done: counters, rates over the last seconds, memory. Shapes and ids only,
never payloads."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from symbiosis.wire.exchange import Op

_WINDOW_S = 5


@dataclasses.dataclass(slots=True)
class ClientStats:
    """One client's session so far; times in seconds, summed over exchanges."""

    name: str
    transport: str
    pid: int | None = None
    tenant: str | None = None
    exchanges: int = 0
    rows: int = 0
    batch_members: float = 0.0  # sum of the sizes of the batches its exchanges ran in
    queue_s: float = 0.0
    compute_s: float = 0.0  # its share, by rows, of the batches it was in
    bytes_in: int = 0
    bytes_out: int = 0
    refused: int = 0
    fetches: int = 0
    lent: bool = False  # it has the weights, and computes by itself

    @property
    def mean_batch(self) -> float:
        return self.batch_members / self.exchanges if self.exchanges else 0.0

    @property
    def mean_queue_ms(self) -> float:
        return 1e3 * self.queue_s / self.exchanges if self.exchanges else 0.0

    def snapshot(self) -> dict[str, object]:
        fields = dataclasses.asdict(self)
        return {**fields, "mean_batch": self.mean_batch, "mean_queue_ms": self.mean_queue_ms}


class RateMeter:
    """Events per second over the last few whole seconds."""

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}

    def add(self, now_s: float, count: int = 1) -> None:
        second = int(now_s)
        if second in self._buckets:
            self._buckets[second] += count
        else:
            self._buckets = {s: n for s, n in self._buckets.items() if s >= second - _WINDOW_S}
            self._buckets[second] = count

    def rate(self, now_s: float) -> float:
        second = int(now_s)
        return sum(self._buckets.get(s, 0) for s in range(second - _WINDOW_S, second)) / _WINDOW_S


class Stats:
    """The executor's counters. Written under the engine's lock; a snapshot may be a little torn."""

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.clients: dict[int, ClientStats] = {}
        self.batches: Counter[int] = Counter()  # batch size → how many
        self.operations: Counter[Op] = Counter()
        self.exchanges = 0
        self.exchange_rate = RateMeter()
        self.row_rate = RateMeter()
        self.compute_s = 0.0
        self.clients_seen = 0
        self._memory = (-math.inf, 0)  # when it was looked at, and what it was

    def batch_ran(
        self, size: int, answered: Sequence[Op], rows: int, now_s: float, compute_s: float
    ) -> None:
        """A batch of ``size`` exchanges, of which those that are at an end are ``answered``."""
        self.exchanges += len(answered)
        if size:
            self.batches[size] += 1
        self.operations.update(answered)
        self.compute_s += compute_s
        self.exchange_rate.add(now_s, len(answered))
        self.row_rate.add(now_s, rows)

    def snapshot(self, now_s: float) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "uptime_s": now_s - self.started_s,
            "clients": {str(id): client.snapshot() for id, client in list(self.clients.items())},
            "clients_seen": self.clients_seen,
            "exchanges": self.exchanges,
            "exchanges_per_s": self.exchange_rate.rate(now_s),
            "rows_per_s": self.row_rate.rate(now_s),
            "batch_sizes": {str(size): count for size, count in sorted(self.batches.items())},
            "operations": {op.name.lower(): count for op, count in self.operations.items()},
            "compute_s": self.compute_s,
            "memory_bytes": self._memory_bytes(now_s),
        }

    def _memory_bytes(self, now_s: float) -> int:
        """Looked at once a second at most: the system goes through all of the process's pages."""
        if now_s - self._memory[0] >= 1:
            self._memory = now_s, resident_bytes()
        return self._memory[1]


def resident_bytes() -> int:
    """This process's proportional set size (shared pages counted in part); 0 where unknown."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
