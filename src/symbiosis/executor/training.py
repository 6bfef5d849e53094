"""Training beside decoding: the share of the time that it is owed, and the size of its pieces.

Knows times and rows; knows nothing of clients or queues.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

CHUNK = 8
"""A decoder waits for training as long as so many of its own products take, at most."""

_LEAST_ROWS = 64  # fewer rows leave the processor waiting for the weight
_MOST_ROWS = 1 << 30
_MOST_KEYS = 4096
_LEAST_COST_S = 1e-6  # so that nothing is owed before anything was passed over


class TrainingShare:
    """Books on executor time while training waits."""

    def __init__(self, share: float) -> None:
        self._rate = share / (1 - share)
        self._debt_s = 0.0  # executor time that training is owed
        self._cost_s = _LEAST_COST_S  # what its last batch took
        self._row_s: dict[Hashable, float] = {}  # key → seconds per row

    def owed(self) -> bool:
        """Does the debt pay for a batch?"""
        return self._debt_s >= self._cost_s

    def owed_in_s(self) -> float:
        """For how long training must be passed over until it is owed a batch."""
        if not self._rate:
            return math.inf
        return max(0.0, self._cost_s - self._debt_s) / self._rate

    def passed_over(self, seconds: float) -> None:
        """Training waited while something else was done, or nothing."""
        self._debt_s += seconds * self._rate

    def ran(self, key: Hashable, rows: int, elapsed_s: float) -> None:
        """A training batch has been computed."""
        self._cost_s = max(_LEAST_COST_S, elapsed_s)
        self._debt_s = max(0.0, self._debt_s - elapsed_s)
        if len(self._row_s) >= _MOST_KEYS:
            self._row_s.clear()
        self._row_s[key] = elapsed_s / max(1, rows)

    def estimate_s(self, key: Hashable, rows: int) -> float:
        """What a training batch would take."""
        return self._row_s[key] * rows if key in self._row_s else self._cost_s

    def most_rows(self, key: Hashable, decoding_s: float) -> int:
        """How many rows to compute at once beside decoders, whose batches take ``decoding_s``."""
        row_s = self._row_s.get(key, 0.0)
        most = int(min(CHUNK * decoding_s / row_s, _MOST_ROWS)) if row_s else 0
        return max(_LEAST_ROWS, most)
