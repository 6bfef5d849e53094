"""The server: one thread that reads frames, runs batches and writes answers.

A single loop instead of a reader thread per client: an exchange of a few kilobytes costs two
system calls and no hand-off between threads. Everything that blocks is a `select`. Knows
sockets; frames and what they ask for are the business of a `Connection`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from symbiosis.errors import ConnectionLost, SymbiosisError
from symbiosis.executor.admission import Admission
from symbiosis.executor.connection import Answer, Connection, Desk
from symbiosis.executor.engine import Engine
from symbiosis.transport.sockets import Address, listen, tune
from symbiosis.wire.exchange import Result
from symbiosis.wire.frames import Limits
from symbiosis.wire.places import Places

logger = logging.getLogger(__name__)

_TAKE_ANSWERS_S = 5.0
"""That all clients together have at the end to take answers that wait for them."""


class Server:
    """Listens on several addresses and serves them from the thread that calls `run`."""

    def __init__(
        self,
        desk: Desk,
        engine: Engine,
        addresses: list[Address],
        limits: Limits,
        inherited: Sequence[tuple[socket.socket, Address]] = (),
    ) -> None:
        """Starts listening, or goes on with sockets that were ``inherited``, and whose owner will
        remove what they leave; raises ConnectionFailed."""
        self.desk = desk
        self.engine = engine
        self.limits = limits
        self._selector = selectors.DefaultSelector()
        self._owns_listeners = not inherited
        self._listeners: list[socket.socket] = []
        self.addresses: list[Address] = []
        self._connections: set[Connection] = set()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._from_other_threads: deque[tuple[Connection, Answer]] = deque()
        self._resumable: set[Connection] = set()
        self.admission = Admission(engine, limits)
        self._stopping = False
        self._thread = threading.get_ident()
        try:
            for listener, taken in inherited or map(listen, addresses):
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ)
                self._listeners.append(listener)
                self.addresses.append(taken)
        except BaseException:
            self._close_all()
            raise

    def run(self) -> None:
        """Serve until `stop`; then answer what is queued and close."""
        self._thread = threading.get_ident()
        torch.set_grad_enabled(False)  # for this thread
        try:
            while not self._stopping:
                self._poll(self.engine.wait_s())
                while self.engine.run_once() and self.engine.waiting:
                    self._poll(0)
            while self.engine.waiting:  # what is held for others is not held now
                if not self.engine.run_once():
                    time.sleep(self.engine.wait_s() or 0)
        finally:
            self._close_all()

    def stop(self) -> None:
        """Ask `run` to finish; from any thread."""
        self._stopping = True
        with contextlib.suppress(OSError):  # it has stopped already
            self._waker.send(b"\0")

    def reply(
        self,
        connection: Connection,
        request: int,
        outcome: Result | SymbiosisError,
        places: Places | None = None,
    ) -> None:
        """Send an answer; from any thread."""
        if threading.get_ident() == self._thread:
            connection.answer(request, outcome, places)
        else:
            self._from_other_threads.append((connection, (request, outcome, places)))
            self._waker.send(b"\0")

    def resume(self, connection: Connection) -> None:
        """A connection that held frames back can take them now."""
        self._resumable.add(connection)

    def closed(self, connection: Connection) -> None:
        """A connection has ended: release what it held."""
        self._connections.discard(connection)

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
            elif key.fileobj is self._woken:
                self._drain_waker()
            else:
                self._accept(key.fileobj)  # type: ignore[arg-type]
        while self._from_other_threads:
            connection, answer = self._from_other_threads.popleft()
            connection.answer(*answer)
        while self._resumable:
            self._resumable.pop().resume()

    def _drain_waker(self) -> None:
        try:
            while self._woken.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except OSError as error:  # the peer gave up, or no descriptors are left
            logger.warning("could not accept a connection: %s", error)
            return
        accepted.setblocking(False)
        tune(accepted)
        transport = "unix" if accepted.family == socket.AF_UNIX else "tcp"
        connection = Connection(self, accepted, transport)
        self._connections.add(connection)
        self.watch(connection, selectors.EVENT_READ)

    def _close_all(self) -> None:
        until_s = time.monotonic() + _TAKE_ANSWERS_S
        for connection in list(self._connections):
            connection.flush_until(until_s)
            connection.fail(ConnectionLost("the executor is shutting down"))
        for listener, address in zip(self._listeners, self.addresses, strict=True):
            listener.close()
            if self._owns_listeners and address.path is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(address.path)
        self._selector.close()
        self._woken.close()
        self._waker.close()
