"""Which exchanges run next, and together: a pure state machine.

No torch, no sockets, no threads, no clock: events come in with the time as an argument, batches
come out. So it is tested without any of them, and a simulator can drive it with a virtual clock.

Invariants, stated once: every submitted request leaves exactly once, in a batch whose requests
share one key and one priority (a large one in several pieces), or through `remove_client` or
`withdraw`; requests of one client leave in the order in which they came, after what goes on (see
`resume`), which is another request each time; within a tenant, a client of weight 1 is passed over
only in favour of one served longer ago, or for a bounded hold; between tenants, see `TenantShares`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from typing import Literal, NamedTuple, get_args

from symbiosis.executor.alignment import Alignment
from symbiosis.executor.shares import TenantShares
from symbiosis.executor.training import TrainingShare
from symbiosis.wire.exchange import Priority

Policy = Literal["align", "greedy", "lockstep", "none"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Request(NamedTuple):
    """One exchange as the scheduler sees it."""

    id: int
    client: int
    key: Hashable  # equal keys may share a batch: one operation on one weight
    rows: int
    priority: Priority
    arrived_s: float
    opens: bool = False  # a hint: a token starts with it (an embedding lookup)
    divisible: bool = False  # its rows are independent of one another
    tenant: str | None = None  # whose client it is from; see `TenantShares`


class Terms(NamedTuple):
    """What a client may ask for when it attaches."""

    weight: float = 1.0  # its turn comes as if it had been served that many times longer ago
    deadline_s: float = math.inf  # each of its requests is held for others that long at most


class Batch(NamedTuple):
    """Requests with one key, to be computed together; or a piece of a single one."""

    requests: tuple[Request, ...]
    start: int = 0
    stop: int | None = None  # of the one request's rows; None: all

    @property
    def rows(self) -> int:
        if self.stop is not None:
            return self.stop - self.start
        return sum(request.rows for request in self.requests)

    @property
    def priority(self) -> Priority:
        return self.requests[0].priority

    @property
    def is_piece(self) -> bool:
        return self.stop is not None

    @property
    def completes(self) -> bool:
        """Are its requests answered once it has run?"""
        return self.stop is None or self.stop == self.requests[0].rows


class Scheduler:
    """Chooses batches by policy.

    - ``align``: a decoder is held, for a bounded time, at the start of a token for the others to
      come by, and later for those just behind, so that they go through the layers together; see
      `Alignment`. Training runs when it is owed, or when it is done before a decoder comes back,
      and in pieces while anybody decodes.
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
        policy: Policy = "align",
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
        self.alignment = Alignment()
        self._max_rows = max_rows
        self._training = TrainingShare(training_share)
        self._hold_s = lockstep_hold_s
        self._queues: dict[int, deque[Request]] = {}
        self._last_served: dict[int, int] = {}
        self._last_seen_s: dict[int, float] = {}
        self._terms: dict[int, Terms] = {}
        self._tenants = TenantShares()
        self._begun: dict[int, int] = {}  # request → rows computed in pieces
        self._held: set[int] = set()  # clients whose next request has been held
        self._resting_since_s: float | None = None  # training waits, and nothing runs
        self._serial = 0

    def __len__(self) -> int:
        """Requests waiting."""
        return sum(map(len, self._queues.values()))

    def admit(self, client: int, terms: Terms) -> None:
        """A client has attached, with terms of its own."""
        self._terms[client] = terms

    def set_share(self, tenant: str, share: float) -> None:
        """What is due to ``tenant`` of the executor's time, against the shares of the others, while
        they all want it. All clients without a tenant are as one of share 1."""
        self._tenants.set_share(tenant, share)

    def submit(self, request: Request) -> None:
        """A request has arrived."""
        client = request.client
        queue = self._queues.get(client)
        if queue is None:
            queue = self._queues[client] = deque()
            self._last_served.setdefault(client, self._serial)
        queue.append(request)
        self._arrived(request)

    def resume(self, request: Request) -> bool:
        """Something that has just run in part goes on with ``request``, ahead of all else of its
        client; False if that has gone."""
        queue = self._queues.get(request.client)
        if queue is None:
            return False
        queue.appendleft(request)
        self._arrived(request, walks=True)
        return True

    def met_by(self, client: int, now_s: float) -> list[int]:
        """The other clients that decode, which `Alignment` could bring together with this one."""
        if self.policy != "align":
            return []
        return [other for other in self.alignment.decoding(now_s) if other != client]

    def remove_client(self, client: int) -> list[int]:
        """A client has gone: forget it; the ids of its requests that will not run."""
        dropped = self._queues.pop(client, deque())
        for request in dropped:
            self._begun.pop(request.id, None)
        self._last_served.pop(client, None)
        self._last_seen_s.pop(client, None)
        self._terms.pop(client, None)
        self._tenants.gone(dropped)
        self._held.discard(client)
        self.alignment.left(client)
        if not any(head.priority for head in self._heads()):  # no more training waits
            self._resting_since_s = None
        return [request.id for request in dropped]

    def withdraw(self, request: Request) -> None:
        """A piece of ``request`` has failed: the others need not run."""
        if self._begun.pop(request.id, None) is not None and request.client in self._queues:
            self._queues[request.client].popleft()
            self._tenants.gone([request])

    def next_batch(self, now_s: float) -> Batch | None:
        """The batch to run now, or None: nothing waits, or `wake_at` says when to ask again."""
        heads = self._heads()
        if not heads:
            return None
        if len(heads) == 1 and self._is_alone(heads[0]):
            self.alignment.looked(now_s)
            return self._take(heads, now_s)
        leader, _ = self._choose(heads, now_s)
        self._rest(leader is None and any(head.priority for head in heads), now_s)
        if leader is None:
            return None
        self.alignment.looked(now_s)
        if self.policy == "align" and leader.priority is Priority.TRAINING:
            return self._training_batch(leader, heads, now_s)
        if self.policy == "none" or len(heads) == 1:
            return self._take([leader], now_s)
        return self._take(self._joined(leader, heads, self._max_rows), now_s)

    def wake_at(self, now_s: float) -> float | None:
        """When to ask again even if nothing else arrives; None when nothing waits."""
        heads = self._heads()
        return self._choose(heads, now_s)[1] if heads else None

    def finished(self, batch: Batch, now_s: float, elapsed_s: float) -> None:
        """``batch`` has run until ``now_s`` and took ``elapsed_s`` of the executor's time."""
        if self._tenants:
            self._tenants.served(batch.requests, elapsed_s)
        for request in batch.requests:
            if request.client in self._last_seen_s:
                self._last_seen_s[request.client] = now_s
        if batch.priority is Priority.TRAINING:
            self._training.ran(batch.requests[0].key, batch.rows, elapsed_s)
            self.alignment.trained(now_s)
            return
        self.alignment.batch_s.add(elapsed_s)
        for request in batch.requests:
            self.alignment.answered(request.client, elapsed_s, now_s)
        if any(queue and queue[0].priority for queue in self._queues.values()):
            self._training.passed_over(elapsed_s)

    def _arrived(self, request: Request, walks: bool = False) -> None:
        if self._tenants:
            self._tenants.arrived(request)
        self._last_seen_s[request.client] = request.arrived_s
        if self.policy == "align" and request.priority is Priority.INTERACTIVE:
            self.alignment.arrived(
                request.client, request.key, request.opens, request.arrived_s, walks
            )

    def _heads(self) -> list[Request]:
        return [queue[0] for queue in self._queues.values() if queue]

    def _is_alone(self, head: Request) -> bool:
        """The short way for a decoder that nobody else could be waited for or wait with."""
        decodes = head.priority is Priority.INTERACTIVE and self._resting_since_s is None
        return decodes and self.policy != "lockstep" and self.alignment.clients <= 1

    # Who goes first

    def _choose(self, heads: list[Request], now_s: float) -> tuple[Request | None, float]:
        """Whose turn it is, with `now_s`; or nobody's, and when to ask again."""
        if self.policy == "align":
            return self._aligned(heads, now_s)
        if self.policy == "lockstep":
            released_s = self._released_at(heads, now_s)
            held = now_s < released_s
            first = self._tenants.first(self._in_turn(heads))
            return None if held else self._fullest(first), released_s
        return min(self._in_turn(heads), key=self._turn), now_s

    def _in_turn(self, heads: list[Request]) -> list[Request]:
        """Those of the priority whose turn it is."""
        first = Priority.TRAINING if self._training.owed() else Priority.INTERACTIVE
        return [head for head in heads if head.priority == first] or heads

    def _turn(self, head: Request) -> tuple[float, float, float, int]:
        had_s = self._tenants.had_s(head) if self._tenants else 0.0
        waited = self._serial - self._last_served[head.client]
        return had_s, -waited * self._terms_of(head.client).weight, head.arrived_s, head.id

    def _terms_of(self, client: int) -> Terms:
        return self._terms.get(client, _NO_TERMS)

    def _fullest(self, heads: list[Request]) -> Request:
        """Lockstep's choice; a client passed over too often comes first."""
        sizes: dict[Hashable, int] = {}
        for head in heads:
            sizes[head.key] = sizes.get(head.key, 0) + 1
        oldest = min(heads, key=self._turn)
        passed_over = self._serial - self._last_served[oldest.client]
        if passed_over > len(self._queues):
            return oldest
        return min(heads, key=lambda head: (-sizes[head.key], self._turn(head)))

    # Align

    def _aligned(self, heads: list[Request], now_s: float) -> tuple[Request | None, float]:
        interactive = [head for head in heads if head.priority is Priority.INTERACTIVE]
        training = [head for head in heads if head.priority is Priority.TRAINING]
        if training and (not interactive or now_s + self._owed_in_s(now_s) <= now_s):
            trainer = min(training, key=self._turn)
            wake_s = self._training_waits_until(trainer, now_s)
            return (trainer, now_s) if wake_s <= now_s else (None, wake_s)
        decoder, wake_s = self._first_released(interactive, now_s)
        if decoder is None and training:
            wake_s = min(wake_s, now_s + self._owed_in_s(now_s))
        return decoder, wake_s

    def _first_released(self, heads: list[Request], now_s: float) -> tuple[Request | None, float]:
        """The first in turn that is held for nobody; else when the first hold ends."""
        wake_s, asked = math.inf, set()
        for head in sorted(heads, key=self._turn):
            if head.key in asked:
                continue
            asked.add(head.key)
            group = [other for other in heads if other.key == head.key]
            released_s = self.alignment.release_s(
                head.key,
                {other.client: other.arrived_s for other in group},
                min(o.arrived_s + self._terms_of(o.client).deadline_s for o in group),
                now_s,
            )
            if released_s <= now_s:
                return head, now_s
            self._held.update(other.client for other in group)
            wake_s = min(wake_s, released_s)
        return None, wake_s

    def _training_waits_until(self, trainer: Request, now_s: float) -> float:
        """For a decoder that would be back before the trainer's next piece is done."""
        owed_s = now_s + self._owed_in_s(now_s)
        back_s, late_s = self.alignment.idle_until(now_s)
        rows = self._piece(trainer, now_s)
        if owed_s <= now_s or back_s - now_s >= self._training.estimate_s(trainer.key, rows):
            return now_s
        return min(owed_s, late_s)

    def _owed_in_s(self, now_s: float) -> float:
        rested_s = 0.0 if self._resting_since_s is None else now_s - self._resting_since_s
        return self._training.owed_in_s() - rested_s

    def _rest(self, rests: bool, now_s: float) -> None:
        """Time in which training waits and nothing runs is owed to it, too."""
        if self._resting_since_s is not None and not rests:
            self._training.passed_over(now_s - self._resting_since_s)
            self._resting_since_s = None
        elif rests and self._resting_since_s is None:
            self._resting_since_s = now_s

    def _most_rows(self, trainer: Request, now_s: float) -> int:
        """Rows of training to compute at once: as ever, unless somebody else decodes."""
        if self.alignment.anyone_but(trainer.client, now_s):
            most = self._training.most_rows(trainer.key, self.alignment.batch_s.typical)
            return min(self._max_rows, most)
        return self._max_rows

    def _piece(self, trainer: Request, now_s: float) -> int:
        """Rows of one training request to compute now; pieces are of about equal size."""
        rest, most = trainer.rows - self._begun.get(trainer.id, 0), self._most_rows(trainer, now_s)
        if not trainer.divisible or rest <= most or most == self._max_rows:
            return rest
        return math.ceil(rest / math.ceil(rest / most))

    def _training_batch(self, leader: Request, heads: list[Request], now_s: float) -> Batch:
        rows, done = self._piece(leader, now_s), self._begun.get(leader.id, 0)
        if rows == leader.rows:
            heads = [head for head in heads if head.id not in self._begun]
            return self._take(self._joined(leader, heads, self._most_rows(leader, now_s)), now_s)
        if done + rows == leader.rows:
            del self._begun[leader.id]
            self._take([leader], now_s)
        else:
            self._begun[leader.id] = done + rows
            self._serial += 1
            self._last_served[leader.client] = self._serial
        return Batch((leader,), done, done + rows)

    # With whom

    def _joined(self, leader: Request, heads: list[Request], most: int) -> list[Request]:
        batch, rows = [leader], leader.rows
        alike = [h for h in heads if h.key == leader.key and h.priority == leader.priority]
        for head in sorted(alike, key=self._turn):
            if head is not leader and rows + head.rows <= most:
                batch.append(head)
                rows += head.rows
        return batch

    def _take(self, requests: list[Request], now_s: float) -> Batch:
        self._serial += 1
        if self._tenants:
            self._tenants.gone(requests)
        for request in requests:
            self._queues[request.client].popleft()
            self._last_served[request.client] = self._serial
            if request.client in self._held:
                self._held.remove(request.client)
                self.alignment.was_held(request.client, now_s - request.arrived_s)
        return Batch(tuple(requests))

    def _released_at(self, heads: list[Request], now_s: float) -> float:
        """Lockstep: now if every client at work is waiting, else the oldest's arrival + hold."""
        at_work = [c for c, seen_s in self._last_seen_s.items() if now_s - seen_s <= self._hold_s]
        waiting = {head.client for head in heads}
        if all(client in waiting for client in at_work):
            return now_s
        return min(head.arrived_s for head in heads) + self._hold_s


_NO_TERMS = Terms()
