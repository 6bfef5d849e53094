"""Which exchanges run next, and together: a pure state machine.

No torch, no sockets, no threads, no clock: events come in with the time as an argument, batches
come out. So it is tested without any of them, and a simulator can drive it with a virtual clock.

Invariants, stated once: every submitted request leaves exactly once, in a batch whose requests
share one key and one priority, or through `remove_client`; requests of one client leave in the
order in which they came; a client is passed over only in favour of one served longer ago.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Literal, NamedTuple, get_args

from symbiosis.wire.exchange import Priority

Policy = Literal["greedy", "lockstep", "none"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Request(NamedTuple):
    """One exchange as the scheduler sees it."""

    id: int
    client: int
    key: Hashable  # equal keys may share a batch: one operation on one weight
    rows: int
    priority: Priority
    arrived_s: float


class Batch(NamedTuple):
    """Requests with one key, to be computed together."""

    requests: tuple[Request, ...]

    @property
    def rows(self) -> int:
        return sum(request.rows for request in self.requests)

    @property
    def priority(self) -> Priority:
        return self.requests[0].priority


class Scheduler:
    """Chooses batches by policy.

    - ``greedy``: opportunistic batching as in the paper: the client served longest ago goes
      first, and every waiting request for the same weight and operation joins it. Nobody waits
      for anybody.
    - ``lockstep``: hold until every client that is at work has a request waiting, then run the
      fullest batch; what mLoRA does, and what a barrier costs. The hold is bounded, and a client
      that is never in the fullest batch gets its turn after as many batches as there are clients.
    - ``none``: no batching, for comparison.

    Interactive requests go before training ones, except that while both wait, training is owed
    ``training_share`` of the executor's time, and collects as soon as the debt pays for a batch.
    Rows per batch stay within ``max_rows`` unless a single request is larger.
    """

    def __init__(
        self,
        policy: Policy = "greedy",
        *,
        max_rows: int = 8192,
        training_share: float = 0.2,
        lockstep_hold_s: float = 0.02,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
        if not 0 <= training_share < 1:
            raise ValueError(f"training_share is {training_share}; it must be in [0, 1)")
        self.policy = policy
        self._max_rows = max_rows
        self._training_rate = training_share / (1 - training_share)
        self._hold_s = lockstep_hold_s
        self._queues: dict[int, deque[Request]] = {}
        self._last_served: dict[int, int] = {}
        self._last_seen_s: dict[int, float] = {}
        self._serial = 0
        self._training_debt_s = 0.0  # executor time that training is owed
        self._training_cost_s = 0.0  # what its last batch took

    def __len__(self) -> int:
        """Requests waiting."""
        return sum(map(len, self._queues.values()))

    def submit(self, request: Request) -> None:
        """A request has arrived."""
        client = request.client
        queue = self._queues.get(client)
        if queue is None:
            queue = self._queues[client] = deque()
            self._last_served.setdefault(client, self._serial)
        queue.append(request)
        self._last_seen_s[client] = request.arrived_s

    def remove_client(self, client: int) -> list[int]:
        """A client has gone: forget it; the ids of its requests that will not run."""
        dropped = self._queues.pop(client, deque())
        self._last_served.pop(client, None)
        self._last_seen_s.pop(client, None)
        return [request.id for request in dropped]

    def next_batch(self, now_s: float) -> Batch | None:
        """The batch to run now, or None: nothing waits, or `wake_at` says when to ask again."""
        heads = [queue[0] for queue in self._queues.values() if queue]
        if not heads or (self.policy == "lockstep" and now_s < self._released_at(heads, now_s)):
            return None
        if len(heads) == 1:
            return self._take(heads)
        priority = self._whose_turn(heads)
        heads = [head for head in heads if head.priority == priority]
        leader = self._leader(heads)
        if self.policy == "none":
            return self._take([leader])
        return self._take(self._joined(leader, heads))

    def wake_at(self, now_s: float) -> float | None:
        """When a held batch will be released even if nothing else arrives."""
        heads = [queue[0] for queue in self._queues.values() if queue]
        return self._released_at(heads, now_s) if heads else None

    def finished(self, batch: Batch, now_s: float, elapsed_s: float) -> None:
        """``batch`` has run until ``now_s`` and took ``elapsed_s`` of the executor's time."""
        for request in batch.requests:
            if request.client in self._last_seen_s:
                self._last_seen_s[request.client] = now_s
        if batch.priority is Priority.TRAINING:
            self._training_cost_s = elapsed_s
            self._training_debt_s = max(0.0, self._training_debt_s - elapsed_s)
        elif any(queue and queue[0].priority for queue in self._queues.values()):
            self._training_debt_s += elapsed_s * self._training_rate

    def _whose_turn(self, heads: list[Request]) -> Priority:
        waiting = {head.priority for head in heads}
        if len(waiting) == 1:
            return waiting.pop()
        due = self._training_debt_s > 0 and self._training_debt_s >= self._training_cost_s
        return Priority.TRAINING if due else Priority.INTERACTIVE

    def _leader(self, heads: list[Request]) -> Request:
        if self.policy == "lockstep":
            sizes: dict[Hashable, int] = {}
            for head in heads:
                sizes[head.key] = sizes.get(head.key, 0) + 1
            fullest = min(heads, key=lambda head: (-sizes[head.key], self._turn(head)))
            oldest = min(heads, key=self._turn)
            passed_over = self._serial - self._last_served[oldest.client]
            return oldest if passed_over > len(self._queues) else fullest
        return min(heads, key=self._turn)

    def _turn(self, head: Request) -> tuple[int, float, int]:
        return self._last_served[head.client], head.arrived_s, head.id

    def _joined(self, leader: Request, heads: list[Request]) -> list[Request]:
        batch, rows = [leader], leader.rows
        for head in sorted(heads, key=self._turn):
            if head is not leader and head.key == leader.key and rows + head.rows <= self._max_rows:
                batch.append(head)
                rows += head.rows
        return batch

    def _take(self, requests: list[Request]) -> Batch:
        self._serial += 1
        for request in requests:
            self._queues[request.client].popleft()
            self._last_served[request.client] = self._serial
        return Batch(tuple(requests))

    def _released_at(self, heads: list[Request], now_s: float) -> float:
        """Lockstep: now if every client at work is waiting, else the oldest's arrival + hold."""
        at_work = [c for c, seen_s in self._last_seen_s.items() if now_s - seen_s <= self._hold_s]
        waiting = {head.client for head in heads}
        if all(client in waiting for client in at_work):
            return now_s
        return min(head.arrived_s for head in heads) + self._hold_s
