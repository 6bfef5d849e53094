"""One client's connection: its frames in, its answers out.

Lives in the server's thread. Knows sockets and frames; what an exchange means is the engine's
business, and who waits for which socket the server's.
"""

from __future__ import annotations

import functools
import logging
import os
import selectors
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

from symbiosis.errors import ProtocolError, SymbiosisError
from symbiosis.executor.ops import Plan
from symbiosis.executor.ring import only_ring
from symbiosis.transport.arena import ArenaUnfit, AttachedArena, receive_with_descriptors
from symbiosis.transport.sockets import exchange_parts
from symbiosis.wire.checksums import checked
from symbiosis.wire.exchange import Exchange, Result, pack_result
from symbiosis.wire.frames import (
    Frame,
    FrameReader,
    Json,
    Kind,
    Rejected,
    error_frame,
    json_frame,
)
from symbiosis.wire.places import Places
from symbiosis.wire.tensors import as_bytes, from_payload, spec_of

if TYPE_CHECKING:
    from symbiosis.executor.server import Server

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 16
"""Exchanges of one connection that may wait at once; beyond it, or while answers
are not taken, the connection is not read: that is the back-pressure."""


Answer = tuple[int, Result | SymbiosisError, Places | None]
"""Request, outcome, and the places for its results."""


class Desk(Protocol):
    """Who answers what is asked outside the data path: the `Executor`."""

    def attach(self, hello: Json, transport: str) -> tuple[int, Json]: ...

    def detach(self, client: int) -> None: ...

    def answer(self, client: int, question: Json) -> tuple[Json, torch.Tensor]: ...


class Connection:
    """One client's socket: its frames in, its answers out."""

    def __init__(self, server: Server, accepted: socket.socket, transport: str) -> None:
        self.socket = accepted
        self._server = server
        self._transport = transport
        self._reader = FrameReader(server.limits, self._admit)
        self._client: int | None = None
        self._descriptors: tuple[int, ...] = ()  # came with HELLO, not yet mapped
        self._arena: AttachedArena | None = None
        self._outbox: deque[memoryview] = deque()
        self._in_flight = 0
        self._events = selectors.EVENT_READ
        self._held_back = False  # frames wait in the reader until answers are taken
        self._closed = False
        self._masked = False  # nothing but masked exchanges may come

    def ready(self, events: int) -> None:
        """The socket can be read, or written again."""
        try:
            if events & selectors.EVENT_WRITE:
                self._flush()
            if events & selectors.EVENT_READ and not self._closed:
                self._read()
        except Exception as error:  # noqa: BLE001
            self._contain(error)

    def resume(self) -> None:
        """Go on with frames that were held back."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001
            self._contain(error)

    def _contain(self, error: Exception) -> None:
        """Whatever goes wrong with one connection ends that connection and no other."""
        if isinstance(error, ProtocolError):
            logger.warning("client %s broke the protocol: %s", self._client, error)
            self.fail(error)
        elif isinstance(error, OSError):  # reset by the peer
            self.close()
        else:  # our bug, not the other clients' problem
            logger.error(
                "client %s: internal error, its connection ends", self._client, exc_info=error
            )
            self.fail(SymbiosisError("internal error in the executor; its log says more"))

    def answer(
        self, request: int, outcome: Result | SymbiosisError, places: Places | None = None
    ) -> None:
        """An exchange has been computed or refused."""
        if self._closed:
            return
        self._in_flight -= 1
        if isinstance(outcome, SymbiosisError):
            self._send([error_frame(request, outcome)])
        else:
            tensors = outcome.tensors
            specs = tuple([spec_of(tensor) for tensor in tensors])
            meta = pack_result(outcome, specs)
            if places is not None:
                assert self._arena is not None
                tensors = self._arena.deliver(places, tensors)
                specs = tuple([spec_of(tensor) for tensor in tensors])
            if tensors and not tensors[0].is_cpu:
                tensors = tuple(tensor.cpu() for tensor in tensors)
            parts = exchange_parts(Kind.RESULT, request, meta, specs, tensors)
            self._count(bytes_out=sum(map(len, parts)))
            self._send(parts)
        if self._held_back:
            self._server.resume(self)
        self._update_events()

    def flush_until(self, until_s: float) -> None:
        """Give the client time to take its answers, before `fail`."""
        try:
            while self._outbox and (left_s := until_s - time.monotonic()) > 0:
                self.socket.settimeout(left_s)
                self.socket.sendall(self._outbox.popleft())
            self.socket.settimeout(0)
        except OSError:  # it has gone, or is too slow
            self.close()

    def fail(self, error: SymbiosisError) -> None:
        """Tell the client why, as far as that is possible at once, and close."""
        if not self._closed:
            self._send([error_frame(0, error)])
        self.close()

    def close(self) -> None:
        """Forget the client and everything that waits for it; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._held_back = False
        self._server.watch(self, 0)
        self.socket.close()
        self._drop_descriptors()
        self._arena = None
        self._outbox.clear()
        self._server.closed(self)
        if self._client is not None:
            self._server.desk.detach(self._client)

    def _read(self) -> None:
        try:
            if self._client is None and self._transport == "unix":
                received = self._receive_greeting()
            else:
                received = self.socket.recv_into(self._reader.buffer())
        except BlockingIOError:
            return
        if not received:
            self.close()
            return
        self._reader.received(received)
        self._work()

    def _receive_greeting(self) -> int:
        """A descriptor may come with HELLO; one that comes later is dropped by the kernel."""
        received, descriptors = receive_with_descriptors(self.socket, self._reader.buffer())
        if descriptors and self._descriptors:
            self._drop_descriptors(descriptors)
            raise ProtocolError("a second descriptor came; a client hands over one arena")
        self._descriptors += descriptors
        return received

    def _drop_descriptors(self, more: tuple[int, ...] = ()) -> None:
        for descriptor in (*self._descriptors, *more):
            os.close(descriptor)
        self._descriptors = ()

    def _work(self) -> None:
        """Handle the frames that are there, as long as their answers are taken."""
        self._held_back = False
        while not self._closed:
            if self._outbox or self._in_flight >= MAX_IN_FLIGHT:
                self._held_back = True
                break
            frame = self._reader.next()
            if frame is None:
                break
            if isinstance(frame, Rejected):
                self._refuse(frame)
            else:
                self._handle(frame)
        self._update_events()

    def _admit(self, kind: Kind, meta: bytes, payload_bytes: int) -> object:
        """Before memory is allocated: does the exchange fit the model's table?"""
        if (kind is Kind.HELLO) != (self._client is None):
            raise ProtocolError(f"unexpected {kind.name} frame: HELLO comes first, and once")
        if kind is Kind.EXCHANGE:
            found = self._server.admission.admit(meta, payload_bytes)
            return only_ring(found) if self._masked else found
        if kind is Kind.PLACED:
            if self._arena is None:
                raise ProtocolError("an exchange with places, but no arena is attached")
            size = self._arena.size_bytes
            placed = self._server.admission.admit_placed(meta, payload_bytes, size)
            return only_ring(placed) if self._masked else placed
        if payload_bytes or kind not in (Kind.HELLO, Kind.REQUEST):
            raise ProtocolError(f"a client may not send a {kind.name} frame like this")
        return None

    def _refuse(self, rejected: Rejected) -> None:
        assert self._client is not None
        self._server.engine.refused(self._client)
        self._send([error_frame(rejected.request, rejected.error)])

    def _handle(self, frame: Frame) -> None:
        if frame.kind is Kind.EXCHANGE or frame.kind is Kind.PLACED:
            assert isinstance(frame.admitted, tuple)
            self._exchange(frame, *frame.admitted)
        elif frame.kind is Kind.HELLO:
            self._greeted(frame.json())
        else:
            self._request(frame)

    def _greeted(self, hello: Json) -> None:
        if bool(hello.get("arena")) != bool(self._descriptors):
            raise ProtocolError("an arena is announced and its descriptor sent, both or neither")
        client, welcome = self._server.desk.attach(hello, self._transport)
        self._client = client
        self._masked = hello.get("masked") is not None
        if self._descriptors:
            try:
                self._arena = AttachedArena(self._descriptors[0])
                welcome = {**welcome, "arena": True}
            except (ArenaUnfit, OSError) as error:
                logger.warning("client %d: its arena is not taken: %s", client, error)
                welcome = {**welcome, "arena": str(error)}
            self._drop_descriptors()
        self._send([json_frame(Kind.WELCOME, 0, welcome)])

    def _exchange(
        self, frame: Frame, exchange: Exchange, plan: Plan, places: Places | None
    ) -> None:
        assert self._client is not None
        self._in_flight += 1
        self._count(bytes_in=len(frame.meta) + len(frame.payload))
        place = None
        if places is None:
            tensors = from_payload(frame.payload, exchange.specs)
        else:
            assert self._arena is not None
            tensors = self._arena.inputs(places, exchange.specs, frame.payload)
            place = functools.partial(self._arena.place, places)
        self._server.engine.submit(
            self._client,
            exchange._replace(tensors=tensors, place=place),
            plan,
            lambda outcome: self._server.reply(self, frame.request, outcome, places),
        )

    def _request(self, frame: Frame) -> None:
        assert self._client is not None
        try:
            answer, payload = self._server.desk.answer(self._client, frame.json())
        except SymbiosisError as error:
            self._send([error_frame(frame.request, error)])
            return
        head = json_frame(Kind.REPLY, frame.request, answer, len(payload))
        self._send([head, as_bytes(payload)])

    def _count(self, bytes_in: int = 0, bytes_out: int = 0) -> None:
        stats = self._server.engine.stats.clients.get(self._client or 0)
        if stats is not None:
            stats.bytes_in += bytes_in
            stats.bytes_out += bytes_out

    def _send(self, parts: list[bytes | memoryview]) -> None:
        if self._reader.checked:
            parts = checked(parts)
        if self._outbox:
            self._outbox.extend(map(memoryview, parts))
            return
        try:
            sent = self.socket.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError:  # the peer has gone; the next read says so
            sent = sum(map(len, parts))
        for part in parts:
            if sent < len(part):
                self._outbox.append(memoryview(part)[sent:])
            sent = max(0, sent - len(part))
        if self._outbox:
            self._update_events()

    def _flush(self) -> None:
        while self._outbox:
            try:
                sent = self.socket.send(self._outbox[0])
            except BlockingIOError:
                break
            if sent == len(self._outbox[0]):
                self._outbox.popleft()
            else:
                self._outbox[0] = self._outbox[0][sent:]
        if self._held_back and not self._outbox:
            self._server.resume(self)
        self._update_events()

    def _update_events(self) -> None:
        if self._closed:
            return
        busy = self._held_back or self._in_flight >= MAX_IN_FLIGHT
        events = selectors.EVENT_WRITE if self._outbox else 0 if busy else selectors.EVENT_READ
        if events != self._events:
            self._events = events
            self._server.watch(self, events)
