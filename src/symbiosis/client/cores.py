"""How the threads of a client on its executor's host wait: asleep, unless it trains there alone.

Who trains or reads a long prompt has work of its own between two exchanges (adapters, attention,
the loss) that wants all cores while the executor waits for it; asleep, its threads would be woken
for each operation. A decoder's own work is small, and its waiting threads would take the cores
from the executor's; so would those of several clients (decision 20). A session sees by what it
sends whether it decodes, and the executor says whether others are at work. Knows counters; knows
no exchanges. Clients that were lent weights are `Borrowed`'s business.
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


class _Seen(NamedTuple):
    exchanges: int
    bytes_sent: int


class Cores:
    """Of one session, whose lock guards it."""

    def __init__(self, sleep: Callable[[bool], None] = sleep_at_once) -> None:
        """Threads sleep from now on; ``sleep`` says so to those of the process."""
        self._sleep = sleep
        self._look_at_s = 0.0
        self._seen = _Seen(0, 0)
        sleep(True)

    def look(self, counters: Counters, now_s: float, shared: bool) -> None:
        """An exchange has been answered at ``now_s``, and counted; ``shared``: see `Result`."""
        if now_s < self._look_at_s or counters.exchanges - self._seen.exchanges < _LEAST_EXCHANGES:
            return
        self._look_at_s = now_s + _LOOK_EVERY_S
        before, self._seen = self._seen, _Seen(counters.exchanges, counters.bytes_sent)
        sent = self._seen.bytes_sent - before.bytes_sent
        large = sent >= _LARGE_BYTES * (self._seen.exchanges - before.exchanges)
        self._sleep(shared or not large)
