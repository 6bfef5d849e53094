"""How much of the executor one client, or all of them, may take up: time, memory, connections.

Pure: time is an argument, and who waits is an object. Knows no sockets.
"""

from __future__ import annotations

import enum
from typing import Generic, NamedTuple, TypeVar

W = TypeVar("W")

FREE_BYTES = 64 << 10
"""An exchange that needs no more is not counted: at most 16 of a connection wait at once."""


class Bounds(NamedTuple):
    """Limits of a server; the defaults suit a host that serves strangers."""

    greeting_s: float = 10.0
    """From connecting to a complete HELLO, TLS included."""
    frame_s: float = 10.0
    """From the first byte of a header to the last of the meta section."""
    window_s: float = 10.0
    """A payload must arrive at `least_rate`, measured over this time."""
    least_rate: float = 1024.0
    """Bytes/s, of payloads that arrive and answers that are taken."""
    crowded_rate: float = float(1 << 20)
    """Bytes/s while other clients wait for memory, over `window_s`: of payloads, and of answers
    that hold some."""
    answer_s: float = 60.0
    """Answers must be taken at `least_rate`, measured over this time."""
    connections: int = 1024
    strangers: int = 128
    """Connections that have not greeted yet; a further one takes the place of the oldest."""
    memory_bytes: int = 4 << 30
    """Payloads that arrive, wait or are being sent, and results; of all connections together."""


class Reading(enum.Enum):
    """What of a frame is being received; NOTHING too while nothing is read."""

    NOTHING = 0
    HEAD = 1
    PAYLOAD = 2


class Pace:
    """Does something that has begun get on?"""

    def __init__(self) -> None:
        self._what: object = None
        self._since_s = 0.0
        self._from = 0

    def is_slow(self, what: object, moved: int, now_s: float, window_s: float, rate: float) -> bool:
        """``what`` is under way (None: nothing is) and ``moved`` bytes have moved so far in all:
        is it slower than ``rate`` bytes/s, over ``window_s`` since it began or since the last
        window? To be called several times a window."""
        if what is None or what != self._what:
            self._what, self._since_s, self._from = what, now_s, moved
            return False
        elapsed_s = now_s - self._since_s
        if elapsed_s < window_s:
            return False
        slow = moved - self._from < rate * elapsed_s
        self._since_s, self._from = now_s, moved
        return slow


class Taken(NamedTuple):
    """What an exchange has taken up, to be given back."""

    input_bytes: int = 0  # of its tenant's account
    memory_bytes: int = 0  # of the budget of all


class Progress:
    """What has moved over one connection so far, and whether that is enough."""

    def __init__(self, opened_s: float) -> None:
        self.received = 0  # bytes
        self.sent = 0  # bytes
        self.frames = 0
        self._opened_s = opened_s
        self._reading, self._sending = Pace(), Pace()

    def overdue(
        self, bounds: Bounds, now_s: float, *, greeted: bool, reading: Reading, unsent: bool,
        holds: bool, crowded: bool,
    ) -> str | None:  # fmt: skip
        """Why the connection has to end, if it has to; to be asked several times a window.
        ``unsent``: answers wait to be taken, which ``holds`` memory; ``crowded``: others wait for
        some."""
        if not greeted and now_s - self._opened_s > bounds.greeting_s:
            return f"no complete HELLO within {bounds.greeting_s:g} s"
        what = None if reading is Reading.NOTHING else (self.frames, reading)
        if reading is Reading.PAYLOAD:
            rate = bounds.crowded_rate if crowded else bounds.least_rate
            if self._reading.is_slow(what, self.received, now_s, bounds.window_s, rate):
                return f"a payload came at less than {rate:g} bytes/s"
        elif self._reading.is_slow(what, 0, now_s, bounds.frame_s, 1):
            return f"a frame was not complete within {bounds.frame_s:g} s"
        urgent = crowded and holds
        rate = bounds.crowded_rate if urgent else bounds.least_rate
        window_s = bounds.window_s if urgent else bounds.answer_s
        answers = ("urgent" if urgent else "patient") if unsent else None
        if self._sending.is_slow(answers, self.sent, now_s, window_s, rate):
            return f"answers were taken at less than {rate:g} bytes/s"
        return None


class Budget(Generic[W]):
    """Memory that is shared by all; who does not get any waits in line, and is told when to try.

    Nobody waits for ever: what is taken is given back when an exchange is answered, or its
    connection is closed for being slow, and neither needs more of it. One exchange that is larger
    than all of it gets its turn alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._line: dict[W, int] = {}

    @property
    def crowded(self) -> bool:
        """Does anybody wait?"""
        return bool(self._line)

    def take(self, who: W, size: int) -> bool:
        """True if ``who`` has ``size`` bytes now; else it waits in line and asks again when it is
        `next_in_line`."""
        first = next(iter(self._line), who)
        if first != who or (self.used and self.used + size > self.limit):
            self._line[who] = size
            return False
        self._line.pop(who, None)
        self.used += size
        return True

    def give(self, size: int) -> None:
        """``size`` bytes are free again."""
        self.used -= size

    def leave(self, who: W) -> None:
        """``who`` does not wait any more."""
        self._line.pop(who, None)

    def next_in_line(self) -> W | None:
        """Who may ask again now: the first in line, if there is room for it."""
        for who, size in self._line.items():
            return who if not self.used or self.used + size <= self.limit else None
        return None
