"""How the threads of a client on its executor's host wait: asleep, unless it trains there alone.

Who trains or reads a long prompt has work of its own between two exchanges (adapters, attention,
the loss) that wants all cores while the executor waits for it; asleep, its threads would be woken
for each operation. But they must not stay awake far into an exchange, where they would take the
cores from the executor's: `symbiosis finetune` arranges for that. A decoder's own work is small,
and its threads would only be in the way; so would those of several clients (decisions 7 and 20). A
session sees by what it sends whether it decodes, and the executor says whether others are at work.
Knows counters; knows no exchanges. Clients that were lent weights are `Borrowed`'s business.
"""

from __future__ import annotations

from symbiosis.client.chains import MAX_INPUT_BYTES
from symbiosis.client.counters import Counters
from symbiosis.waiting import sleep_at_once, waits_briefly

_LOOK_EVERY_S = 1.0
_LEAST_EXCHANGES = 8
"""Fewer say nothing."""


class Cores:
    """Of one session, whose lock guards it. From the start on threads sleep while they wait."""

    def __init__(self) -> None:
        self._look_at_s = 0.0
        self._exchanges = self._bytes_sent = 0  # at the last look
        self._briefly = waits_briefly()
        sleep_at_once(True)

    def look(self, counters: Counters, now_s: float, shared: bool) -> None:
        """An exchange has been answered at ``now_s``, and counted; ``shared``: see `Result`."""
        count = counters.exchanges - self._exchanges
        if now_s < self._look_at_s or count < _LEAST_EXCHANGES:
            return
        decodes = counters.bytes_sent - self._bytes_sent <= MAX_INPUT_BYTES * count
        self._look_at_s = now_s + _LOOK_EVERY_S
        self._exchanges, self._bytes_sent = counters.exchanges, counters.bytes_sent
        sleep_at_once(shared or decodes or not self._briefly)
