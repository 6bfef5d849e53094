"""How the threads of a client on its executor's host wait: asleep, unless it trains there alone.

Who trains or reads a long prompt has work of its own between two exchanges (adapters, attention,
the loss) that wants all cores while the executor waits for it; asleep, its threads would be woken
for each operation. A decoder's own work is small, and its waiting threads would take the cores
from the executor's; so would those of several clients (decision 20). A session sees by what it has
counted which of these it is. Knows counters; knows no exchanges. Clients that were lent weights
are `Borrowed`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from symbiosis.client.counters import Counters
from symbiosis.waiting import sleep_at_once

_LOOK_EVERY_S = 1.0
_LEAST_EXCHANGES = 8
"""Fewer say nothing."""
_LARGE_BYTES = 64 << 10
"""Of an input, on average: no decoder sends so much."""
_SHARE_OF_WAITING = 0.1
"""Of the time in the executor: who waits longer there than one in ten is not alone."""


class _Seen(NamedTuple):
    exchanges: int
    bytes_sent: int
    queue_us: int
    compute_us: int


class Cores:
    """Of one session, whose lock guards it."""

    def __init__(self, sleep: Callable[[bool], None] = sleep_at_once) -> None:
        """Threads sleep from now on; ``sleep`` says so to those of the process."""
        self._sleep = sleep
        self._look_at_s = 0.0
        self._seen = _Seen(0, 0, 0, 0)
        sleep(True)

    def look(self, counters: Counters, now_s: float) -> None:
        """An exchange has been answered at ``now_s``, and counted."""
        if now_s < self._look_at_s or counters.exchanges - self._seen.exchanges < _LEAST_EXCHANGES:
            return
        self._look_at_s = now_s + _LOOK_EVERY_S
        before = self._seen
        self._seen = now = _Seen(
            counters.exchanges, counters.bytes_sent, counters.queue_us, counters.compute_us
        )
        count, sent, queued, computed = (a - b for a, b in zip(now, before, strict=True))
        alone = queued <= _SHARE_OF_WAITING * (queued + computed)
        self._sleep(not (alone and sent >= _LARGE_BYTES * count))
