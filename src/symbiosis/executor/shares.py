"""Whose turn it is between tenants: start-time fair queueing on the executor's own time.

Pure, as the scheduler that asks it. Each tenant has, in each class of priority, a virtual time:
what it has had of the executor there, divided by its share. Who has had least goes first, however
many sessions it has. Who comes back after a pause starts where the one with least is: a pause
earns no credit. (Goyal, Vin, Cheng: Start-time Fair Queuing, SIGCOMM 1996; the start of who comes
back as in Linux's CFS, for batches in which several tenants are served.) So while two tenants both
have something waiting and share no batch, what they have had, divided by their shares, stays
within the cost of one batch of each; and nobody rests while anything waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from symbiosis.wire.exchange import Priority

if TYPE_CHECKING:
    from symbiosis.executor.scheduler import Request

_Class = tuple[str | None, Priority]
"""A tenant, in one class of priority. None: the clients that belong to no tenant."""


class TenantShares:
    """False while there are no tenants: then nothing here is asked."""

    def __init__(self) -> None:
        self._share: dict[str | None, float] = {}
        self._had_s: dict[_Class, float] = {}
        self._waiting: dict[_Class, int] = {}
        self._least_s: dict[Priority, float] = {}  # never falls

    def __bool__(self) -> bool:
        return bool(self._share)

    def set_share(self, tenant: str, share: float) -> None:
        """What is due to ``tenant``, against the shares of the others; 1 if it is never said."""
        self._share[tenant] = share

    def arrived(self, request: Request) -> None:
        """It is not yet among those that wait."""
        key = (request.tenant, request.priority)
        if not self._waiting.get(key):
            self._had_s[key] = max(self.had_s(request), self._least_s.get(request.priority, 0.0))
        self._waiting[key] = self._waiting.get(key, 0) + 1

    def gone(self, requests: Iterable[Request]) -> None:
        """They wait no longer: they run, or never will."""
        for request in requests:
            key = (request.tenant, request.priority)
            if self._waiting.get(key):
                self._waiting[key] -= 1

    def served(self, requests: Sequence[Request], elapsed_s: float) -> None:
        """The executor has worked so long for these, together."""
        priority = requests[0].priority
        at_work = [self.had_s(request) for request in requests]
        at_work += [
            self._had_s[key] for key, count in self._waiting.items() if count and key[1] == priority
        ]
        self._least_s[priority] = max(self._least_s.get(priority, 0.0), min(at_work))
        rows = max(1, sum(request.rows for request in requests))
        for request in requests:
            cost_s = elapsed_s * request.rows / rows if len(requests) > 1 else elapsed_s
            had_s = self.had_s(request) + cost_s / self._share.get(request.tenant, 1.0)
            self._had_s[request.tenant, priority] = had_s

    def had_s(self, request: Request) -> float:
        """The virtual time of its tenant: least goes first."""
        return self._had_s.get((request.tenant, request.priority), 0.0)

    def first(self, heads: list[Request]) -> list[Request]:
        """Those of the tenant that has had least."""
        if not self._share:
            return heads
        tenant = min(heads, key=self.had_s).tenant
        return [head for head in heads if head.tenant == tenant]
