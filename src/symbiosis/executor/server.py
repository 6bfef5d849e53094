"""The server: one thread that reads frames, runs batches and writes answers.

A single loop instead of a reader thread per client: an exchange of a few kilobytes costs two
system calls and no hand-off between threads. Everything that blocks is a `select`. Knows
sockets; frames and what they ask for are the business of a `Connection`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from symbiosis.errors import ConnectionFailed, ConnectionLost, SymbiosisError
from symbiosis.executor.admin import AdminConnection
from symbiosis.executor.admission import Admission
from symbiosis.executor.bounds import Bounds, Budget, Taken
from symbiosis.executor.connection import Answer, Connection, Desk, Placed
from symbiosis.executor.encrypted import EncryptedConnection
from symbiosis.executor.engine import Engine
from symbiosis.executor.guard import LOOK_EVERY_S, Guard, context_for, refusal
from symbiosis.transport.addresses import Address, listen, tune
from symbiosis.transport.device_arena import DeviceBlocks
from symbiosis.transport.tls import ServerTls, TlsSocket
from symbiosis.wire.exchange import Result
from symbiosis.wire.frames import Limits

logger = logging.getLogger(__name__)

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_TAKE_ANSWERS_S = 5.0
"""That all clients together have at the end to take answers that wait for them."""


class _Door(NamedTuple):
    """One address that is listened on, and who answers there."""

    listener: socket.socket
    address: Address
    desk: Desk
    context: ssl.SSLContext | None
    is_owned: bool
    """Whether it is ours to remove."""
    is_admin: bool


class Server:
    """Listens on several addresses and serves them from the thread that calls `run`."""

    def __init__(
        self,
        desk: Desk,
        engine: Engine,
        addresses: list[Address],
        limits: Limits,
        inherited: Sequence[tuple[socket.socket, Address]] = (),
        *,
        tls: ServerTls | None = None,
        guard: Guard | None = None,
        blocks: DeviceBlocks | None = None,
        bounds: Bounds = Bounds(),
        admin: tuple[Address, Desk] | None = None,
    ) -> None:
        """Starts listening, or goes on with sockets that were ``inherited``, and whose owner will
        remove what they leave; raises ConnectionFailed. ``tls`` is for the tls:// addresses,
        ``blocks`` what clients of this host may have of the GPU's memory, ``admin`` a door for the
        operator."""
        self.engine = engine
        self.blocks = blocks
        self.limits = limits
        self._selector = selectors.DefaultSelector()
        self._guard = guard
        self._delayed: set[Connection] = set()  # by their tenant's quota
        self._hung_up_at_s = 0.0  # when to look whether they are still there: nobody reads them
        self._doors: list[_Door] = []
        self.addresses: list[Address] = []
        self.bounds = bounds
        self.budget: Budget[Connection] = Budget(bounds.memory_bytes)
        self.watched_s = 0.0
        """Time in which sockets were looked after: a long batch is no client's fault."""
        self._look_s = min(1.0, min(bounds.greeting_s, bounds.frame_s, bounds.window_s) / 4)
        self._looked_at_s = engine.clock()
        self._deaf = False  # no further connections are accepted for now
        self._connections: set[Connection] = set()
        self._strangers: dict[Connection, None] = {}  # have not greeted; the oldest first
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)  # full, it has woken us already
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._from_other_threads: deque[tuple[Connection, Answer]] = deque()
        self._resumable: set[Connection] = set()
        self.admission = Admission(engine, limits)
        self._stopping = False
        self._thread = threading.get_ident()
        try:
            for listener, address in inherited:
                context = context_for(address, tls)
                self._take(listener, address, desk, context, is_owned=False)
            for address in () if inherited else addresses:
                self._open(address, desk, tls)
            if admin is not None:
                self._take(*listen(admin[0]), admin[1], None, is_owned=True, is_admin=True)
        except BaseException:
            self._close_all()
            raise

    def _open(self, address: Address, desk: Desk, tls: ServerTls | None) -> None:
        context = context_for(address, tls)  # its files come first
        self._take(*listen(address), desk, context, is_owned=True)

    def _take(
        self,
        listener: socket.socket,
        address: Address,
        desk: Desk,
        context: ssl.SSLContext | None,
        *,
        is_owned: bool,
        is_admin: bool = False,
    ) -> None:
        listener.setblocking(False)
        door = _Door(listener, address, desk, context, is_owned, is_admin)
        self._doors.append(door)
        self._selector.register(listener, selectors.EVENT_READ, door)
        if not is_admin:
            self.addresses.append(address)

    def run(self) -> None:
        """Serve until `stop`; then answer what is queued and close."""
        self._thread = threading.get_ident()
        torch.set_grad_enabled(False)  # for this thread
        try:
            while not self._stopping:
                self._poll(self._wait_s())
                while self.engine.run_once() and self.engine.waiting:
                    self._poll(0)
            while self.engine.waiting:  # what is held for others is not held now
                if not self.engine.run_once():
                    time.sleep(self.engine.wait_s() or 0)
            self._pass_on_answers()
        finally:
            self._close_all()

    def stop(self) -> None:
        """Ask `run` to finish; from any thread."""
        self._stopping = True
        self._wake()

    def reply(
        self,
        connection: Connection,
        request: int,
        outcome: Result | SymbiosisError,
        placed: Placed | None = None,
        taken: Taken = Taken(),
    ) -> None:
        """Send an answer; from any thread."""
        if threading.get_ident() == self._thread:
            connection.answer(request, outcome, placed, taken)
        else:
            answer = (request, outcome, placed, taken)
            self._from_other_threads.append((connection, answer))
            self._wake()

    def resume(self, connection: Connection) -> None:
        """A connection that held frames back can take them now."""
        self._resumable.add(connection)

    def delay(self, connection: Connection) -> None:
        """A connection holds frames back until its tenant's quota allows more."""
        self._delayed.add(connection)

    def disconnect(self, client: int, error: SymbiosisError) -> bool:
        """End a client's connection and tell it why; False if there is none. In the server's
        thread only."""
        found = [each for each in self._connections if each.client == client]
        for connection in found:
            connection.fail(error)
        return bool(found)

    def greeted(self, connection: Connection) -> None:
        """A connection is a client's now."""
        self._strangers.pop(connection, None)

    def take(self, connection: Connection, memory_bytes: int) -> bool:
        """May an exchange have that much memory now? Else its connection waits in line."""
        found = self.budget.take(connection, memory_bytes)
        if found:
            self.give_back(0)  # there may be room for the next, too
        return found

    def leave_line(self, connection: Connection) -> None:
        """A connection waits for something else first."""
        if self.budget.crowded:
            self.budget.leave(connection)
            self.give_back(0)

    def give_back(self, memory_bytes: int) -> None:
        """An exchange has been answered: whoever waits for memory may have it."""
        self.budget.give(memory_bytes)
        if self.budget.crowded and (who := self.budget.next_in_line()) is not None:
            self._resumable.add(who)

    def closed(self, connection: Connection) -> None:
        """A connection has ended: release what it held."""
        self._connections.discard(connection)
        self._strangers.pop(connection, None)
        self.budget.leave(connection)
        self._delayed.discard(connection)

    def watch(self, connection: Connection, events: int) -> None:
        """Wait for ``events`` on a connection; 0 for none."""
        registered = connection.socket in self._selector.get_map()
        if not events and registered:
            self._selector.unregister(connection.socket)
        elif events and registered:
            self._selector.modify(connection.socket, events, connection)
        elif events:
            self._selector.register(connection.socket, events, connection)

    def _poll(self, timeout_s: float | None) -> None:
        for key, events in self._selector.select(0 if self._resumable else timeout_s):
            if isinstance(key.data, Connection):
                key.data.ready(events)
            elif isinstance(key.data, _Door):
                self._accept(key.data)
            else:
                self._drain_waker()
        self._pass_on_answers()
        if self._guard is not None:
            self._look_after_tenants(self._guard)
        if self._resumable:
            resumable, self._resumable = self._resumable, set()
            for connection in resumable:
                connection.resume()
        if self.engine.clock() - self._looked_at_s >= self._look_s:
            self._look_after_connections()

    def _pass_on_answers(self) -> None:
        """Those that other threads have computed."""
        while self._from_other_threads:
            connection, answer = self._from_other_threads.popleft()
            connection.answer(*answer)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # awake it is, or it has stopped already
            self._waker.send(b"\0")

    def _wait_s(self) -> float | None:
        """How long nothing has to be done unless something comes in."""
        wait_s = self.engine.wait_s()
        if self._connections or self._deaf:
            wait_s = self._look_s if wait_s is None else min(wait_s, self._look_s)
        if self._guard is None:
            return wait_s
        now_s = self.engine.clock()
        delays_s = [c.account.delay_s(now_s) for c in self._delayed if c.account is not None]
        return min([LOOK_EVERY_S, *delays_s, *([] if wait_s is None else [wait_s])])

    def _look_after_connections(self) -> None:
        """End those that are overdue; try again to accept; let the next in line have memory."""
        now_s = self.engine.clock()
        self.watched_s += min(now_s - self._looked_at_s, 2 * self._look_s)
        self._looked_at_s = now_s
        for connection in list(self._connections):
            connection.look(self.bounds, self.watched_s)
        self._listen_again()
        self.give_back(0)
        self.engine.look_at_company()

    def _look_after_tenants(self, guard: Guard) -> None:
        now_s = self.engine.clock()
        for connection in list(self._delayed):
            if connection.account is None or connection.account.delay_s(now_s) <= 0:
                self._delayed.discard(connection)
                self._resumable.add(connection)
        for client in guard.look():
            self.disconnect(client, refusal())
        if now_s >= self._hung_up_at_s:
            self._hung_up_at_s = now_s + LOOK_EVERY_S
            for connection in [each for each in self._delayed if each.has_hung_up]:
                connection.close()

    def _drain_waker(self) -> None:
        try:
            while self._woken.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _accept(self, door: _Door) -> None:
        try:
            accepted, _ = door.listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("could not accept a connection: %s", error)
            if error.errno in _EXHAUSTED:  # until one closes, or the next look
                self._hear(False)
            return
        accepted.setblocking(False)
        tune(accepted)
        try:
            connection = self._connection(accepted, door)
        except OSError as error:  # it has gone again
            logger.warning("could not begin TLS with a client: %s", error)
            accepted.close()
            return
        self._connections.add(connection)
        self._strangers[connection] = None
        self.watch(connection, selectors.EVENT_READ)
        self._make_room(connection)

    def _make_room(self, newest: Connection) -> None:
        """Too many clients: no more. Too many that have not greeted: the oldest of them goes, for
        clients greet at once."""
        full = len(self._connections) - len(self._strangers) >= self.bounds.connections
        if full and not isinstance(newest, AdminConnection):  # the operator can always come in
            newest.fail(_full(f"serves {self.bounds.connections} clients already"))
        elif len(self._strangers) > self.bounds.strangers:
            next(iter(self._strangers)).fail(_full("is being connected to by too many at once"))

    def _hear(self, hear: bool) -> None:
        """Accept connections, or leave them to wait: a listener that cannot be accepted from is
        ready for ever, and would keep the loop spinning."""
        if self._deaf is not hear:
            return
        self._deaf = not hear
        for door in self._doors:
            if hear:
                self._selector.register(door.listener, selectors.EVENT_READ, door)
            else:
                self._selector.unregister(door.listener)

    def _listen_again(self) -> None:
        if not self._stopping:
            self._hear(True)

    def _connection(self, accepted: socket.socket, door: _Door) -> Connection:
        if door.context is not None:
            return EncryptedConnection(self, TlsSocket(accepted, door.context), door.desk)
        transport = "unix" if accepted.family == socket.AF_UNIX else "tcp"
        kind = AdminConnection if door.is_admin else Connection
        return kind(self, accepted, transport, door.desk)

    def _close_all(self) -> None:
        until_s = time.monotonic() + _TAKE_ANSWERS_S
        for connection in list(self._connections):
            connection.flush_until(until_s)
            connection.fail(ConnectionLost("the executor is shutting down"))
        for door in self._doors:
            door.listener.close()
            if door.is_owned and door.address.path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(door.address.path)
        self._selector.close()
        self._woken.close()
        self._waker.close()


def _full(reason: str) -> ConnectionFailed:
    return ConnectionFailed(f"this executor {reason}: try again later")
