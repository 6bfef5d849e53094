"""One client's rhythm: which exchange it will send next, when, and when it is late.

A decoder sends the same sequence of exchanges for every token. The sequence is learned from the
keys alone: a token starts where the key that began the last one comes back (an embedding lookup,
where there is one). Knows one client; knows nothing of batches, queues or other clients.

Times in seconds on the caller's clock. A gap is the time between an answer and the next arrival:
within a token the client's own layers, before a token sampling and whoever reads it.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Hashable

LATE = 3.0
"""Later than so many times the 90th percentile of its gaps, a client is late: nobody waits for
it until it comes. One that was late by a whole token is not regular: nobody waits for it until it
has gone through a token again."""

AWAY_S = 1.0
"""A longer gap is no part of a rhythm: somebody reads an answer, or has nothing to ask."""

_LONGEST_TOKEN = 4096  # exchanges that are remembered; a client cannot make the table grow


class Recent:
    """The last few observations of one quantity: their median and their 90th percentile."""

    def __init__(self, size: int) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._size = size

    def add(self, value: float) -> None:
        if len(self._order) == self._size:
            del self._sorted[bisect.bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        bisect.insort(self._sorted, value)

    @property
    def typical(self) -> float:
        """The median; 0 before the first observation."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else 0.0

    @property
    def most(self) -> float:
        """The 90th percentile; 0 before the first observation."""
        return self._sorted[len(self._sorted) * 9 // 10] if self._sorted else 0.0


class Rhythm:
    """What is known about one client's interactive exchanges."""

    def __init__(self) -> None:
        self.regular = False  # it went through its last token without a stall
        self.work_s = Recent(8)  # a token from its first arrival to its last answer, less holds
        self.load = 0.0  # the part of the time that its tokens occupy the executor
        self.busy_s = 0.0  # what its last token occupied the executor for
        self.held_s = 0.0  # in this token so far
        self.answered_s: float | None = None  # None: its exchange waits or is being computed
        self.at_start = False
        self._gap, self._pause = Recent(32), Recent(16)
        self._anchor: int | None = None  # keys are kept as their hashes
        self._anchor_opens = False
        self._positions: dict[int, int] = {}  # in the last whole token
        self._keys: dict[int, int] = {}  # in this token
        self._length = _LONGEST_TOKEN
        self._step = 0  # exchanges of this token before the present one
        self._position = 0  # of the present exchange in the last whole token
        self.started_s = -math.inf
        self._busy_s = 0.0
        self._stalled = False

    def arrived(
        self, key: Hashable, opens: bool, now_s: float, looked_s: float, walks: bool = False
    ) -> None:
        """It has sent an exchange; ``opens`` hints that a token starts with it. It had not come
        yet when the executor last looked, at ``looked_s``, before a batch. ``walks``: it has not
        been sent, but follows in the executor from the one before."""
        key = hash(key)  # which may be long, and clients choose it
        self.at_start = self._starts(key, opens)
        if self.answered_s is not None and not walks:
            self._observe_gap(now_s - self.answered_s, looked_s - self.answered_s)
        if self.at_start:
            self._start(now_s)
        else:
            self._step += 1
        if self._step < _LONGEST_TOKEN:
            self._keys.setdefault(key, self._step)
        self._position = self._positions.get(key, self._step)
        self.answered_s = None

    def answered(self, elapsed_s: float, now_s: float) -> None:
        """Its exchange was computed, in a batch that took ``elapsed_s``."""
        self._busy_s += elapsed_s
        self.answered_s = now_s

    @property
    def expected_s(self) -> float:
        """When its next exchange will come; in the past if one is there."""
        return -math.inf if self.answered_s is None else self.answered_s + self._next_gap.typical

    @property
    def late_s(self) -> float:
        """From when on it is late; never while it waits for us."""
        return math.inf if self.answered_s is None else self.answered_s + LATE * self._next_gap.most

    def steps_to(self, key: Hashable) -> int | None:
        """How many exchanges it will send before one with ``key``; None: it sends none such."""
        position = self._positions.get(hash(key))
        return None if position is None else (position - self._position - 1) % self._length

    def reaches_s(self, steps: int, now_s: float) -> float:
        """When it will have sent ``steps`` exchanges and the one after them."""
        at_s = max(now_s, self.expected_s) + steps * self.work_s.typical / self._length
        ends_token = self._position + 1 < self._length <= self._position + 1 + steps
        return at_s + self._pause.typical if ends_token else at_s

    @property
    def _next_gap(self) -> Recent:
        return self._pause if self._position + 1 >= self._length else self._gap

    def _starts(self, key: int, opens: bool) -> bool:
        if key == self._anchor:
            return True
        # A lookup that was the anchor may have become part of a chain, which then opens.
        lost = self._anchor is None or self._step > (1 if opens else 2) * self._length
        recurs = key in self._keys and not self._anchor_opens
        if (opens and not self._anchor_opens) or (lost and (recurs or opens)):
            self._anchor, self._anchor_opens = key, opens
            return True
        return False

    def _start(self, now_s: float) -> None:
        """A token has ended with the last answer, and another one begins."""
        if self.answered_s is not None and self.started_s > -math.inf:
            self.work_s.add(max(0.0, self.answered_s - self.started_s - self.held_s))
            period_s = now_s - self.started_s - self.held_s
            self.busy_s = self._busy_s
            self.load = min(1.0, self._busy_s / period_s) if period_s > 0 else 1.0
            self.regular = bool(self._positions) and not self._stalled
            self._positions, self._length = self._keys, self._step + 1
        self._keys, self._step, self.started_s = {}, 0, now_s
        self._stalled, self._busy_s, self.held_s = False, 0.0, 0.0

    def _observe_gap(self, gap_s: float, least_s: float) -> None:
        """A gap between ``least_s`` and ``gap_s``: a batch ran when it ended; if ``least_s`` is
        negative, none has run and the gap is exact."""
        gaps = self._pause if self.at_start else self._gap
        if least_s < 0:
            least_s = gap_s
        was_away = least_s > AWAY_S
        if self.regular and (was_away or least_s > max(LATE * gaps.most, self.work_s.typical)):
            self.regular, self._stalled = False, not self.at_start
        if not was_away:
            gaps.add(max(least_s, min(gap_s, gaps.most or gap_s)))
