"""The engine: takes exchanges in, asks the scheduler, computes batches, hands results out.

Whoever calls `run_once` computes; a lock makes that one thread at a time, which owns the device
meanwhile. With clients on sockets that is the server's thread; a client in the same process
lends its own. Knows no sockets.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from symbiosis.errors import ConnectionLost, ExchangeFailed, InvalidInput, SymbiosisError
from symbiosis.executor import batch, ops, walks
from symbiosis.executor.processes import Processes
from symbiosis.executor.scheduler import Batch, Request, Scheduler, Terms
from symbiosis.executor.stats import ClientStats, Stats
from symbiosis.executor.tenants import Account
from symbiosis.executor.weights import Weights
from symbiosis.waiting import sleep_at_once
from symbiosis.wire.chain import Step, unpack_chain
from symbiosis.wire.exchange import Exchange, Op, Priority, Result

logger = logging.getLogger(__name__)

Reply = Callable[[Result | SymbiosisError], None]
"""Called exactly once per submitted exchange, by the thread that computed it."""

_MOST_DECODED_ROWS = 32
"""Of a batch; one with more is for who trains or reads a prompt."""

_FAILURES = (RuntimeError, MemoryError, ValueError, IndexError, TypeError)


class _Pending(NamedTuple):
    exchange: Exchange
    reply: Reply
    walk: walks.Walk | None = None  # of a chain that is computed product by product


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
        self._unanswered: dict[int, _Pending] = {}  # of the batch that is being computed
        self._pieces: dict[int, batch.Pieces] = {}  # of requests computed in part
        self._accounts: dict[int, Account] = {}  # of clients that belong to a tenant
        self._tenants: dict[str | None, Account] = {}  # the same, and of clients that have left
        self._company = walks.Company()
        self._counted: dict[int, int] = {}  # exchanges by client, at the last look
        self._shared = False  # was more than one at work then?
        self._large = False  # was the last batch of a client in another process one?
        self._processes = Processes()  # of clients that were lent weights
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
            self._company.left(client)
        for pending in dropped:
            pending.reply(_left())

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
            now_s = self.clock()
            walk = self._walk(client, exchange, now_s)
            self._pending[number] = _Pending(exchange, reply, walk)
            self._scheduler.submit(
                Request(
                    number,
                    client,
                    walk.key if walk else batch.key(exchange, plan.joinable, number),
                    plan.rows,
                    exchange.priority,
                    now_s,
                    opens=_opens(exchange),
                    divisible=batch.divisible(exchange, plan.joinable),
                    tenant=account.tenant if account is not None else None,
                )
            )

    def _walk(self, client: int, exchange: Exchange, now_s: float) -> walks.Walk | None:
        """A chain goes from product to product while others decode who do not ask for it."""
        if exchange.op is not Op.CHAIN or exchange.priority is not Priority.INTERACTIVE:
            return None
        others = self._scheduler.met_by(client, now_s)
        if not others or not walks.begins_with_product(exchange):
            return None
        if self._company.alike(client, hash(batch.key(exchange, True, 0)), others):
            return None
        return walks.Walk(exchange, now_s)

    def refused(self, client: int) -> None:
        """Count an exchange that was refused."""
        with self._queue_lock:
            if (stats := self.stats.clients.get(client)) is not None:
                stats.refused += 1

    def look_at_company(self) -> None:
        """To be called about once a second. With one client at work the device's threads stay
        awake for its next exchange, if it decodes; more than one want the cores. Clients are told
        with their results, or by the memory that is lent. Of those that were lent weights, each
        process that uses the processor is at work."""
        with self._queue_lock:
            counts = {id: each.exchanges for id, each in self.stats.clients.items()}
            lent = {id: each.pid for id, each in self.stats.clients.items() if each.lent}
        working = {id for id, count in counts.items() if count != self._counted.get(id, 0)}
        self._counted = counts
        busy = self._processes.busy({pid for pid in lent.values() if pid is not None})
        working_pids = busy.union(pid for id, pid in lent.items() if pid and id in working)
        unknown = list(lent.values()).count(None)
        at_work = len(working - lent.keys()) + len(working_pids) + unknown
        self._shared = at_work > 1
        sleep_at_once(self._shared or self._large)
        if self.weights.lender is not None:
            self.weights.lender.announce(at_work)

    def _leave_cores(self, batch: Batch) -> None:
        """Who trains or reads a prompt wants them now, for work of its own until it asks again."""
        client = self.stats.clients.get(batch.requests[0].client)
        if client is None or client.transport == "inproc":
            return
        large = batch.rows > _MOST_DECODED_ROWS
        if large is not self._large:
            self._large = large
            sleep_at_once(self._shared or large)

    @property
    def waiting(self) -> bool:
        """Is there anything to compute, now or later, or being computed?"""
        return bool(self._pending or self._unanswered)

    def run_once(self) -> bool:
        """Compute the next batch, if the scheduler has one to run now. Whatever goes wrong,
        everybody in it is answered."""
        with self._device_lock:
            started_s = self.clock()
            with self._queue_lock:
                chosen = self._scheduler.next_batch(started_s)
                if chosen is None:
                    return False
                take = self._pending.pop if chosen.completes else self._pending.__getitem__
                self._unanswered = {request.id: take(request.id) for request in chosen.requests}
            try:
                self._run(chosen, list(self._unanswered.values()), started_s)
            except BaseException as error:
                self._abandon(chosen)
                if not isinstance(error, Exception):  # an interrupted client of this process
                    raise
                logger.error("internal error in a batch of %s", chosen, exc_info=error)
            finally:
                self._unanswered.clear()
        return True

    def _run(self, chosen: Batch, pendings: list[_Pending], started_s: float) -> None:
        """Compute a batch and answer it."""
        if chosen.is_piece:
            results, spent_s = self._compute_piece(chosen, pendings[0], started_s)
            now_s = self.clock()
        else:
            members = [pending.walk or pending.exchange for pending in pendings]
            results = self._compute(members, self._go_out(chosen))
            now_s = self.clock()
            spent_s = now_s - started_s
        walking: list[tuple[Request, _Pending]] = []
        for request, pending, found in zip(chosen.requests, pendings, results, strict=False):
            if (walk := pending.walk) is not None:
                walk.walked(len(pendings), spent_s)
            if found is None:
                walking.append((request, pending))
            elif isinstance(found, SymbiosisError):
                self._answer(request, found)
            elif walk is not None:
                size = round(walk.mean_batch)
                answer = self._result(found, walk.arrived_s, now_s, walk.elapsed_s, size)
                self._answer(request, answer)
            else:
                answer = self._result(found, request.arrived_s, now_s, spent_s, len(pendings))
                self._answer(request, answer)
        self._account(chosen, pendings, [request.id for request, _ in walking], started_s, now_s)
        self._leave_cores(chosen)
        if walking:
            self._walk_on(walking, now_s)

    def _result(
        self,
        tensors: tuple[torch.Tensor, ...],
        arrived_s: float,
        now_s: float,
        compute_s: float,
        batch_size: int,
    ) -> Result:
        """An answer to what came at ``arrived_s``: it waited whenever it was not computed."""
        compute_us = int(compute_s * 1e6)
        queue_us = max(0, int((now_s - arrived_s) * 1e6) - compute_us)
        return Result(tensors, queue_us, compute_us, batch_size, self._shared)

    def _answer(self, request: Request, outcome: Result | SymbiosisError) -> None:
        self._unanswered.pop(request.id).reply(outcome)

    def _abandon(self, chosen: Batch) -> None:
        """Of a batch that has failed in a way that should not happen, nothing goes on."""
        with self._queue_lock:
            for request in chosen.requests:
                self._pieces.pop(request.id, None)
                if self._pending.pop(request.id, None) is not None:
                    self._scheduler.withdraw(request)
        for pending in self._unanswered.values():
            with contextlib.suppress(Exception):
                pending.reply(ExchangeFailed("internal error in the executor; its log says more"))

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

    def _go_out(self, chosen: Batch) -> bool:
        """On a GPU: is any of a batch for whoever is not in this process? It is waited for then,
        so that times are those of computing; else they may be those of launching."""
        if self.weights.device.type != "cuda":
            return False
        clients = [self.stats.clients.get(request.client) for request in chosen.requests]
        return any(client is None or client.transport != "inproc" for client in clients)

    def _compute(
        self, members: list[Exchange | walks.Walk], waits: bool
    ) -> list[tuple[torch.Tensor, ...] | SymbiosisError | None]:
        """A batch that fails is tried again one by one: one client's failure stays its own. With
        ``waits``, results are there when it returns.

        Gradients are off: whoever runs the engine sees to that, once for its thread.
        """
        try:
            found: list[tuple[torch.Tensor, ...] | SymbiosisError | None] = []
            found.extend(walks.compute(members, self.weights))
            if waits and any(outcome is not None for outcome in found):
                self.weights.wait()
            return found
        except SymbiosisError as error:
            if len(members) == 1:
                return [error]
            return [self._compute([member], waits)[0] for member in members]
        except _FAILURES as error:
            if len(members) > 1:
                return [self._compute([member], waits)[0] for member in members]
            (member,) = members
            exchange = member if isinstance(member, Exchange) else member.exchange
            name = self.weights[exchange.weights[0]].names[0]
            logger.warning(
                "%s of %s on %s failed: %s",
                exchange.op.name.lower(),
                exchange.specs[0],
                name,
                error,
            )
            return [ExchangeFailed(f"{exchange.op.name.lower()} on {name} failed: {error}")]

    def _walk_on(self, walking: list[tuple[Request, _Pending]], now_s: float) -> None:
        """Chains go on to their next product, unless a client has gone meanwhile."""
        gone: list[Request] = []
        with self._queue_lock:
            for request, pending in walking:
                assert pending.walk is not None
                if self._scheduler.resume(request._replace(key=pending.walk.key, arrived_s=now_s)):
                    self._pending[request.id] = self._unanswered.pop(request.id)
                else:
                    gone.append(request)
        for request in gone:
            self._answer(request, _left())

    def _pieces_of(self, chosen: Batch, pending: _Pending) -> batch.Pieces:
        number = chosen.requests[0].id
        pieces = self._pieces.pop(number, None) or batch.Pieces(
            pending.exchange, chosen.requests[0].rows
        )
        if not chosen.completes:
            self._pieces[number] = pieces
        return pieces

    def _compute_piece(
        self, chosen: Batch, pending: _Pending, started_s: float
    ) -> tuple[list[tuple[torch.Tensor, ...] | SymbiosisError | None], float]:
        """Nothing yet, or with the last piece the whole result; a failure ends it at once. Also the
        seconds that all pieces took so far."""
        with self._queue_lock:
            pieces = self._pieces_of(chosen, pending)
        piece = pieces.exchange(chosen.start, chosen.start + chosen.rows)
        (found,) = self._compute([piece], self._go_out(chosen))
        if isinstance(found, tuple):
            try:
                pieces.add(chosen.start, found)
            except _FAILURES as error:  # no memory for the whole result
                found = ExchangeFailed(f"{pending.exchange.op.name.lower()} failed: {error}")
        pieces.elapsed_s += self.clock() - started_s
        if isinstance(found, tuple):
            return ([pieces.results()] if chosen.completes else []), pieces.elapsed_s
        with self._queue_lock:
            number = chosen.requests[0].id
            self._scheduler.withdraw(chosen.requests[0])
            self._pieces.pop(number, None)
            waits = self._pending.pop(number, None) is not None or chosen.completes
        return ([found] if waits else []), pieces.elapsed_s  # its client may have left meanwhile

    def _account(
        self,
        chosen: Batch,
        pendings: list[_Pending],
        walking: list[int],
        started_s: float,
        now_s: float,
    ) -> None:
        """After the answers have gone out: nobody waits for this. The requests in ``walking`` have
        not been answered, nor has anybody by a piece that is not the last."""
        elapsed_s = now_s - started_s
        size = len(chosen.requests) if chosen.completes else 0
        rows = max(1, chosen.rows)
        with self._queue_lock:
            self._scheduler.finished(chosen, now_s, elapsed_s)
            answered: list[Op] = []
            for request, pending in zip(chosen.requests, pendings, strict=True):
                stats = self.stats.clients.get(request.client)
                account = self._tenants.get(request.tenant) if self._tenants else None
                share_s = elapsed_s * (1.0 if chosen.is_piece else request.rows / rows)
                done = chosen.completes and request.id not in walking
                if account is not None:  # its client may have left meanwhile
                    account.spent(share_s, now_s)
                if done:
                    answered.append(pending.exchange.op)
                if stats is None:
                    continue
                stats.compute_s += share_s
                if chosen.completes:  # at each stop of a chain it has waited anew
                    stats.queue_s += started_s - request.arrived_s
                if chosen.is_piece or done:
                    stats.rows += chosen.rows if chosen.is_piece else request.rows
                if done:
                    walk = pending.walk
                    stats.exchanges += 1
                    stats.batch_members += walk.mean_batch if walk else size
            self.stats.batch_ran(size, answered, chosen.rows, now_s, elapsed_s)


def _opens(exchange: Exchange) -> bool:
    """Does a token start with it? That is what a lookup hints at, and a chain that has it first."""
    if exchange.op is Op.CHAIN:
        return unpack_chain(exchange.params).steps[0].step is Step.EMBEDDING
    return exchange.op is Op.EMBEDDING


def _left() -> ConnectionLost:
    return ConnectionLost("the client left before this exchange ran")
