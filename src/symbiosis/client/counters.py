"""What a session has cost: counted as its exchanges are answered."""

from __future__ import annotations

import dataclasses

from symbiosis.wire.exchange import Exchange, Result


@dataclasses.dataclass(frozen=True)
class SessionStats:
    """What one session has cost so far. Times in seconds, summed over exchanges."""

    exchanges: int
    forward: int  # exchanges outside a backward pass
    grouped: int  # products answered along with another, without an exchange of their own
    bytes_sent: int
    bytes_received: int
    wait_s: float  # from handing an exchange over to holding its result
    queue_s: float  # of that, waiting in the executor
    compute_s: float  # of that, the executor's computation
    mean_batch: float
    fetched_bytes: int
    verified: int  # products compared by the random check
    unverified: int  # products of exchanges drawn for it that have none


class Counters:
    """The mutable side of `SessionStats`; the session's lock guards it."""

    def __init__(self) -> None:
        self.exchanges = self.forward = 0
        self.bytes_sent = self.bytes_received = self.fetched_bytes = 0
        self.wait_s = 0.0
        self.queue_us = self.compute_us = self.batch_members = 0

    def answered(self, exchange: Exchange, result: Result, wait_s: float, forward: bool) -> None:
        """One exchange was answered after ``wait_s``."""
        self.wait_s += wait_s
        self.exchanges += 1
        self.forward += forward
        self.queue_us += result.queue_us
        self.compute_us += result.compute_us
        self.batch_members += result.batch_size
        for tensor in exchange.tensors:
            self.bytes_sent += tensor.nbytes
        for tensor in result.tensors:
            self.bytes_received += tensor.nbytes

    def stats(self, *, grouped: int, verified: int, unverified: int) -> SessionStats:
        """With what others count."""
        return SessionStats(
            exchanges=self.exchanges,
            forward=self.forward,
            grouped=grouped,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            wait_s=self.wait_s,
            queue_s=self.queue_us / 1e6,
            compute_s=self.compute_us / 1e6,
            mean_batch=self.batch_members / self.exchanges if self.exchanges else 0.0,
            fetched_bytes=self.fetched_bytes,
            verified=verified,
            unverified=unverified,
        )
