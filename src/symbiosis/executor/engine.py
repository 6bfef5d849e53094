"""The engine: takes exchanges in, asks the scheduler, computes batches, hands results out.

Whoever calls `run_once` computes; a lock makes that one thread at a time, which owns the device
meanwhile. With clients on sockets that is the server's thread; a client in the same process
lends its own. Knows no sockets.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from symbiosis.errors import ConnectionLost, ExchangeFailed, InvalidInput, SymbiosisError
from symbiosis.executor import batch, ops
from symbiosis.executor.scheduler import Batch, Request, Scheduler, Terms
from symbiosis.executor.stats import ClientStats, Stats
from symbiosis.executor.tenants import Account
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import Exchange, Op, Result

logger = logging.getLogger(__name__)

Reply = Callable[[Result | SymbiosisError], None]
"""Called exactly once per submitted exchange, by the thread that computed it."""

_FAILURES = (RuntimeError, MemoryError, ValueError, IndexError, TypeError)


class _Pending(NamedTuple):
    exchange: Exchange
    reply: Reply


class Engine:
    """Runs exchanges on the hosted weights. Every method may be called from any thread."""

    def __init__(
        self,
        weights: Weights,
        scheduler: Scheduler,
        *,
        max_result_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.weights = weights
        self.clock = clock
        self.stats = Stats(clock())
        self._scheduler = scheduler
        self._max_result_bytes = max_result_bytes
        self._pending: dict[int, _Pending] = {}
        self._pieces: dict[int, batch.Pieces] = {}  # of requests computed in part
        self._accounts: dict[int, Account] = {}  # of clients that belong to a tenant
        self._tenants: dict[str | None, Account] = {}  # the same, and of clients that have left
        self._request_ids = itertools.count(1)
        self._client_ids = itertools.count(1)
        self._queue_lock = threading.Lock()  # scheduler, pending, stats; held briefly
        self._device_lock = threading.Lock()  # held while a batch is computed

    @property
    def policy(self) -> str:
        return self._scheduler.policy

    def add_client(
        self,
        name: str,
        transport: str,
        pid: int | None = None,
        terms: Terms | None = None,
        account: Account | None = None,
    ) -> int:
        """A client has attached; its number for all that follows. ``account`` is its tenant's."""
        with self._queue_lock:
            client = next(self._client_ids)
            if terms is not None:
                self._scheduler.admit(client, terms)
            tenant = None if account is None else account.tenant
            self.stats.clients[client] = ClientStats(name, transport, pid, tenant)
            if account is not None:
                self._accounts[client] = account
                self._tenants[account.tenant] = account
                self._scheduler.set_share(account.tenant, account.share)
            self.stats.clients_seen += 1
        return client

    def remove_client(self, client: int) -> None:
        """A client has gone: what it still waits for will not run, and its replies are told so."""
        with self._queue_lock:
            ids = self._scheduler.remove_client(client)
            dropped = [self._pending.pop(id) for id in ids]
            for id in ids:
                self._pieces.pop(id, None)
            self.stats.clients.pop(client, None)
            self._accounts.pop(client, None)
        for pending in dropped:
            pending.reply(ConnectionLost("the client left before this exchange ran"))

    def account_of(self, client: int) -> Account | None:
        """Of the client's tenant; None if it has none."""
        return self._accounts.get(client)

    def charge(self, account: Account, elapsed_s: float) -> None:
        """A tenant pays for time that went into something else than exchanges."""
        with self._queue_lock:
            account.spent(elapsed_s, self.clock())

    def admit(self, exchange: Exchange) -> ops.Plan:
        """Check an exchange whose payload has not been read; raises what is wrong with it."""
        plan = ops.check(exchange, self.weights)
        if plan.result_bytes > self._max_result_bytes:
            raise InvalidInput(
                f"the result would take {plan.result_bytes} bytes; the limit is "
                f"{self._max_result_bytes}: send fewer rows at a time"
            )
        return plan

    def submit(self, client: int, exchange: Exchange, plan: ops.Plan, reply: Reply) -> None:
        """Queue an admitted exchange with its tensors; ``reply`` will be called once."""
        try:
            ops.check_values(exchange, plan)
        except InvalidInput as error:
            self.refused(client)
            reply(error)
            return
        with self._queue_lock:
            number = next(self._request_ids)
            account = self._accounts.get(client) if self._accounts else None
            self._pending[number] = _Pending(exchange, reply)
            self._scheduler.submit(
                Request(
                    number,
                    client,
                    batch.key(exchange, plan.joinable, number),
                    plan.rows,
                    exchange.priority,
                    self.clock(),
                    opens=exchange.op is Op.EMBEDDING,
                    divisible=batch.divisible(exchange, plan.joinable),
                    tenant=account.tenant if account is not None else None,
                )
            )

    def refused(self, client: int) -> None:
        """Count an exchange that was refused."""
        with self._queue_lock:
            if (stats := self.stats.clients.get(client)) is not None:
                stats.refused += 1

    @property
    def waiting(self) -> bool:
        """Is there anything to compute, now or later?"""
        return bool(self._pending)

    def run_once(self) -> bool:
        """Compute the next batch, if the scheduler has one to run now."""
        with self._device_lock:
            started_s = self.clock()
            with self._queue_lock:
                chosen = self._scheduler.next_batch(started_s)
                if chosen is None:
                    return False
                take = self._pending.pop if chosen.completes else self._pending.__getitem__
                pendings = [take(request.id) for request in chosen.requests]
                pieces = self._pieces_of(chosen, pendings[0]) if chosen.is_piece else None
            if pieces is None:
                results = self._compute([pending.exchange for pending in pendings])
                now_s = self.clock()
                compute_us = int((now_s - started_s) * 1e6)
            else:
                results = self._compute_piece(chosen, pieces)
                now_s = self.clock()
                pieces.elapsed_s += now_s - started_s
                compute_us = int(pieces.elapsed_s * 1e6)
            for request, pending, found in zip(chosen.requests, pendings, results, strict=False):
                if isinstance(found, tuple):
                    queue_us = max(0, int((now_s - request.arrived_s) * 1e6) - compute_us)
                    pending.reply(Result(found, queue_us, compute_us, len(pendings)))
                else:
                    pending.reply(found)
            self._account(chosen, pendings[0].exchange, started_s, now_s)
        return True

    def wait_s(self) -> float | None:
        """Seconds until a held batch is released; None when nothing waits."""
        if not self._pending:
            return None
        now_s = self.clock()
        with self._queue_lock:
            wake_s = self._scheduler.wake_at(now_s)
        return None if wake_s is None else max(0.0, wake_s - now_s)

    def clients_of(self, tenant: str) -> dict[str, object]:
        """The counters of one tenant's clients, as plain JSON types."""
        with self._queue_lock:
            clients = self.stats.clients.items()
            return {str(id): each.snapshot() for id, each in clients if each.tenant == tenant}

    def snapshot(self) -> dict[str, object]:
        """The counters as plain JSON types."""
        with self._queue_lock:
            waiting, alignment = len(self._scheduler), self._scheduler.alignment
        return {
            **self.stats.snapshot(self.clock()),
            "waiting": waiting,
            "policy": self.policy,
            "holds": alignment.holds,
            "held_s": alignment.held_s,
        }

    def _compute(
        self, exchanges: list[Exchange]
    ) -> list[tuple[torch.Tensor, ...] | SymbiosisError]:
        """A batch that fails is tried again one by one: one client's failure stays its own.

        Gradients are off: whoever runs the engine sees to that, once for its thread.
        """
        try:
            return list(batch.compute(exchanges, self.weights))
        except SymbiosisError as error:
            if len(exchanges) == 1:
                return [error]
            return [self._compute([exchange])[0] for exchange in exchanges]
        except _FAILURES as error:
            if len(exchanges) > 1:
                return [self._compute([exchange])[0] for exchange in exchanges]
            exchange = exchanges[0]
            name = self.weights[exchange.weights[0]].names[0]
            logger.warning(
                "%s of %s on %s failed: %s",
                exchange.op.name.lower(),
                exchange.specs[0],
                name,
                error,
            )
            return [ExchangeFailed(f"{exchange.op.name.lower()} on {name} failed: {error}")]

    def _pieces_of(self, chosen: Batch, pending: _Pending) -> batch.Pieces:
        number = chosen.requests[0].id
        pieces = self._pieces.pop(number, None) or batch.Pieces(pending.exchange)
        if not chosen.completes:
            self._pieces[number] = pieces
        return pieces

    def _compute_piece(
        self, chosen: Batch, pieces: batch.Pieces
    ) -> list[tuple[torch.Tensor, ...] | SymbiosisError]:
        """Nothing yet, or with the last piece the whole result; a failure ends it at once."""
        (found,) = self._compute([pieces.exchange(chosen.start, chosen.start + chosen.rows)])
        if isinstance(found, tuple):
            pieces.add(chosen.start, found)
            return [pieces.results()] if chosen.completes else []
        with self._queue_lock:
            number = chosen.requests[0].id
            self._scheduler.withdraw(chosen.requests[0])
            self._pieces.pop(number, None)
            self._pending.pop(number, None)
        return [found]

    def _account(self, chosen: Batch, exchange: Exchange, started_s: float, now_s: float) -> None:
        """After the answers have gone out: nobody waits for this."""
        elapsed_s = now_s - started_s
        size = len(chosen.requests) if chosen.completes else 0  # a piece answers nobody
        rows = max(1, chosen.rows)
        with self._queue_lock:
            self._scheduler.finished(chosen, now_s, elapsed_s)
            self.stats.batch_ran(exchange.op, size, chosen.rows, now_s, elapsed_s)
            for request in chosen.requests:
                stats = self.stats.clients.get(request.client)
                account = self._tenants.get(request.tenant) if self._tenants else None
                if account is not None:  # its client may have left meanwhile
                    share = 1.0 if chosen.is_piece else request.rows / rows
                    account.spent(elapsed_s * share, now_s)
                if stats is not None:
                    if chosen.is_piece:
                        stats.rows += chosen.rows
                        stats.compute_s += elapsed_s
                    else:
                        stats.rows += request.rows
                        stats.compute_s += elapsed_s * request.rows / rows
                    if chosen.completes:
                        stats.exchanges += 1
                        stats.batch_members += size
                        stats.queue_s += started_s - request.arrived_s
