"""What a tenant may use, and what it has used: pure accounting, with the time passed in.

No clock, no sockets, no threads. Times are seconds of any monotonic clock.

Limits per second are buckets that may be overdrawn by the one request that empties them: a
request larger than the bucket is delayed, never stuck, and over any span the tenant gets at most
what the bucket holds, what flowed in, and one request.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from symbiosis.errors import QuotaExceeded

_HOUR_S = 3600.0


class Quota(NamedTuple):
    """A tenant's limits; None is none."""

    max_sessions: int | None = None
    """At once; beyond it HELLO is refused."""
    max_bytes_in_flight: int | None = None
    """Of inputs that have been taken in and not answered, over all sessions; beyond it the
    tenant's connections are not read."""
    rows_per_s: float | None = None
    """Rows of exchanges; beyond it the tenant's connections are not read."""
    burst_rows: float | None = None
    """What may come at once after a pause; by default what flows in within one second."""
    executor_s_per_hour: float | None = None
    """The executor's computing time; it refills evenly. Used up: exchanges are refused."""


NO_LIMITS = Quota()


class Bucket:
    """Holds at most ``capacity``, refills by ``rate`` a second, starts full."""

    def __init__(self, capacity: float, rate: float, now_s: float) -> None:
        self.capacity = capacity
        self.rate = rate
        # One tuple, swapped whole: another thread that reads sees the one or the other.
        self._state = (capacity, now_s)

    def level(self, now_s: float) -> float:
        """What is there; below 0 while it is overdrawn."""
        level, at_s = self._state
        return min(self.capacity, level + self.rate * max(0.0, now_s - at_s))

    def take(self, amount: float, now_s: float) -> None:
        """Take ``amount``, whether it is there or not."""
        self._state = (self.level(now_s) - amount, max(now_s, self._state[1]))

    def empty_for_s(self, now_s: float) -> float:
        """Seconds until there is anything in it; 0 if there is."""
        level = self.level(now_s)
        return 0.0 if level > 0 else max(-level / self.rate, 1e-3)

    def resized(self, capacity: float, rate: float, now_s: float) -> Bucket:
        """A bucket of other dimensions in which as much is missing."""
        other = Bucket(capacity, rate, now_s)
        other.take(self.capacity - self.level(now_s), now_s)
        return other


class Account:
    """What one tenant uses, over all of its sessions.

    Used by the server's thread alone, except `spent`, which the engine calls under its lock.
    """

    def __init__(self, tenant: str, quota: Quota, now_s: float, share: float = 1.0) -> None:
        self.tenant = tenant
        self.share = share
        self.quota = NO_LIMITS
        self.sessions = 0
        self.bytes_in_flight = 0
        self.executor_s = 0.0
        self.rows = 0
        self._rows: Bucket | None = None
        self._seconds: Bucket | None = None
        self.limit(quota, now_s)

    def limit(self, quota: Quota, now_s: float) -> None:
        """Other limits from now on; what has been used stays used."""
        if quota == self.quota:
            return
        rate = quota.rows_per_s
        burst = quota.burst_rows or rate
        seconds = quota.executor_s_per_hour
        self._rows = _bucket(self._rows, burst, rate, now_s)
        self._seconds = _bucket(self._seconds, seconds, seconds and seconds / _HOUR_S, now_s)
        self.quota = quota

    def open_session(self) -> None:
        """Raises QuotaExceeded."""
        most = self.quota.max_sessions
        if most is not None and self.sessions >= most:
            raise QuotaExceeded(
                f"tenant {self.tenant} has {self.sessions} sessions and may have {most} at once: "
                f"close one, or ask the operator for more"
            )
        self.sessions += 1

    def close_session(self) -> None:
        self.sessions -= 1

    def delay_s(self, now_s: float) -> float:
        """How long the next exchange has to wait: 0; or seconds; or, until something of the
        tenant's has been answered, infinitely."""
        most = self.quota.max_bytes_in_flight
        if most is not None and self.bytes_in_flight >= most:
            return math.inf
        return 0.0 if self._rows is None else self._rows.empty_for_s(now_s)

    def begin(self, num_bytes: int, rows: int, now_s: float) -> None:
        """An exchange is taken in. Raises QuotaExceeded if the executor's time is used up."""
        if self._seconds is not None and (empty_s := self._seconds.empty_for_s(now_s)) > 0:
            raise QuotaExceeded(
                f"tenant {self.tenant} has used up its {self.quota.executor_s_per_hour:g} s of "
                f"executor time per hour: there is some again in {math.ceil(empty_s)} s, and "
                f"{60 * self._seconds.rate:.3g} s more with every minute"
            )
        self.bytes_in_flight += num_bytes
        self.rows += rows
        if self._rows is not None:
            self._rows.take(rows, now_s)

    def end(self, num_bytes: int) -> None:
        """An exchange has been answered, or will never be."""
        self.bytes_in_flight -= num_bytes

    def spent(self, executor_s: float, now_s: float) -> None:
        """The executor has computed for this tenant."""
        self.executor_s += executor_s
        if self._seconds is not None:
            self._seconds.take(executor_s, now_s)

    def snapshot(self, now_s: float) -> dict[str, object]:
        """Use and limits as plain JSON types; ``_left`` is None without a limit."""
        return {
            "sessions": self.sessions,
            "bytes_in_flight": self.bytes_in_flight,
            "rows": self.rows,
            "executor_s": self.executor_s,
            "rows_left": self._rows and self._rows.level(now_s),
            "executor_s_left": self._seconds and self._seconds.level(now_s),
            "share": self.share,
            "quota": self.quota._asdict(),
        }


def _bucket(
    old: Bucket | None, capacity: float | None, rate: float | None, now_s: float
) -> Bucket | None:
    if capacity is None or rate is None:
        return None
    if old is None:
        return Bucket(capacity, rate, now_s)
    return old.resized(capacity, rate, now_s)
