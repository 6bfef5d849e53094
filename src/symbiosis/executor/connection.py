"""One client's connection: its frames in, its answers out.

Lives in the server's thread. Knows sockets and frames; what an exchange means is the engine's
business, and who waits for which socket the server's.
"""

from __future__ import annotations

import functools
import logging
import select
import selectors
import socket
from typing import TYPE_CHECKING, Protocol

import torch

from symbiosis.errors import (
    ConnectionLost,
    ExchangeFailed,
    ProtocolError,
    RequestRefused,
    SymbiosisError,
)
from symbiosis.executor.bounds import FREE_BYTES, Bounds, Progress, Reading, Taken
from symbiosis.executor.memories import Memories
from symbiosis.executor.ops import Plan
from symbiosis.executor.outbox import Outbox
from symbiosis.executor.ring import only_ring
from symbiosis.executor.tenants import Account
from symbiosis.transport.addresses import peer_of
from symbiosis.transport.arena import AttachedArena, receive_with_descriptors
from symbiosis.transport.lent import Lender
from symbiosis.transport.tls import TlsSocket
from symbiosis.wire.checksums import checked
from symbiosis.wire.exchange import Exchange, Result, pack_result
from symbiosis.wire.frames import (
    Admitted,
    Frame,
    FrameReader,
    Json,
    Kind,
    Postponed,
    Rejected,
    error_frame,
    exchange_parts,
    json_frame,
)
from symbiosis.wire.places import Places
from symbiosis.wire.tensors import as_bytes, empty_payload, offsets, spec_of

if TYPE_CHECKING:
    from symbiosis.executor.server import Server

logger = logging.getLogger(__name__)

_EXCHANGES = (Kind.EXCHANGE, Kind.PLACED, Kind.ON_DEVICE)

MAX_IN_FLIGHT = 16
"""Exchanges of one connection that may wait at once; beyond it, or while answers
are not taken, the connection is not read: that is the back-pressure."""

_FREE_REQUESTS = ("stats", "digest")
"""What a tenant may ask for even when its executor time is used up; it costs next to nothing."""

Placed = tuple[AttachedArena, Places]
"""Memory that is shared with the client, and where in it an exchange's tensors lie."""

Fitted = tuple[Exchange, Plan, Placed | None]
"""An exchange that may come in, before its tensors have."""

Answer = tuple[int, Result | SymbiosisError, Placed | None, Taken]
"""Request, outcome, the places for its results, and what the exchange has taken."""


class Desk(Protocol):
    """Who answers what is asked outside the data path: the `Executor`."""

    def attach(
        self, hello: Json, transport: str, certificate: tuple[str, ...] = ()
    ) -> tuple[int, Json]: ...

    def detach(self, client: int) -> None: ...

    def lend(self, client: int, pid: int | None) -> Lender | None: ...

    def answer(self, client: int, question: Json) -> tuple[Json, torch.Tensor]: ...


class Connection:
    """One client's socket: its frames in, its answers out."""

    def __init__(
        self, server: Server, accepted: socket.socket | TlsSocket, transport: str, desk: Desk
    ) -> None:
        self.socket = accepted
        self.account: Account | None = None  # of its tenant, if there are tenants
        self._server = server
        self._desk = desk
        self._transport = transport
        self._reader = FrameReader(server.limits, self._admit)
        self._client: int | None = None
        self._memories = Memories(server.blocks)
        self._outbox = Outbox(accepted)
        self._in_flight = 0
        self._arriving = Taken()  # by an exchange that the engine does not know yet
        self._unsent_bytes = 0  # of the budget, by answers that are not sent yet
        self._progress = Progress(server.watched_s)
        self._events = selectors.EVENT_READ
        self._held_back = False  # frames wait in the reader until answers are taken
        self._closed = False
        self._masked = False  # nothing but masked exchanges may come

    @property
    def client(self) -> int | None:
        """Its number, once it has greeted."""
        return self._client

    @property
    def has_hung_up(self) -> bool:
        """Has the client closed its end? For a connection that is not read."""
        poller = select.poll()
        poller.register(self.socket.fileno(), select.POLLRDHUP)
        return bool(poller.poll(0))

    def ready(self, events: int) -> None:
        """The socket can be read, or written again."""
        try:
            self._go_on(events)
        except Exception as error:  # noqa: BLE001
            self._contain(error)

    def resume(self) -> None:
        """Go on with frames that were held back."""
        try:
            self._resume()
        except Exception as error:  # noqa: BLE001
            self._contain(error)

    def _resume(self) -> None:
        self._work()

    def _go_on(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ and not self._closed:
            self._read()

    def _contain(self, error: Exception) -> None:
        """Whatever goes wrong with one connection ends that connection and no other."""
        if isinstance(error, ProtocolError):
            logger.warning("client %s broke the protocol: %s", self._client, error)
            self.fail(error)
        elif isinstance(error, SymbiosisError):  # not let in
            logger.warning("a client over %s was refused: %s", self._transport, error)
            self.fail(error)
        elif isinstance(error, OSError):  # reset by the peer
            self.close()
        else:  # our bug, not the other clients' problem
            logger.error(
                "client %s: internal error, its connection ends", self._client, exc_info=error
            )
            self.fail(SymbiosisError("internal error in the executor; its log says more"))

    def answer(
        self,
        request: int,
        outcome: Result | SymbiosisError,
        placed: Placed | None = None,
        taken: Taken = Taken(),
    ) -> None:
        """An exchange has been computed or refused."""
        if self.account is not None:
            self.account.end(taken.input_bytes)
        if self._closed:
            self._give_back(taken.memory_bytes)
            return
        self._in_flight -= 1
        if not isinstance(outcome, SymbiosisError):
            try:
                parts = self._answered(request, outcome, placed)
            except Exception as error:
                logger.error("client %s: an answer cannot be sent", self._client, exc_info=error)
                outcome = ExchangeFailed(f"the result could not be sent: {error}")
        if isinstance(outcome, SymbiosisError):
            parts = [error_frame(request, outcome)]
        else:
            self._count(bytes_out=sum(map(len, parts)))
        self._send(parts)
        if self._outbox.parts:
            self._unsent_bytes += taken.memory_bytes
        else:
            self._give_back(taken.memory_bytes)
        if self._held_back:
            self._server.resume(self)
        self._update_events()

    def _answered(
        self, request: int, result: Result, placed: Placed | None
    ) -> list[bytes | memoryview]:
        """A RESULT frame; what the client has places for is put there."""
        tensors = result.tensors
        specs = tuple([spec_of(tensor) for tensor in tensors])
        meta = pack_result(result, specs)
        if placed is not None:
            arena, places = placed
            tensors = arena.deliver(places, tensors)
            specs = tuple([spec_of(tensor) for tensor in tensors])
        if tensors and not tensors[0].is_cpu:
            tensors = tuple(tensor.cpu() for tensor in tensors)
        return exchange_parts(Kind.RESULT, request, meta, specs, tensors)

    def look(self, bounds: Bounds, now_s: float) -> None:
        """End it if it is overdue; ``now_s`` counts only time in which sockets were looked
        after."""
        reading = Reading.NOTHING
        if self._reader.mid_frame and not self._is_busy:
            reading = Reading.PAYLOAD if self._reader.in_payload else Reading.HEAD
        reason = self._progress.overdue(
            bounds,
            now_s,
            greeted=self._client is not None,
            reading=reading,
            unsent=bool(self._outbox.parts),
            holds=self._unsent_bytes > 0,
            crowded=self._server.budget.crowded,
        )
        if reason is not None:
            logger.warning("client %s is too slow, its connection ends: %s", self._client, reason)
            self.fail(ConnectionLost(f"too slow: {reason}"))

    def flush_until(self, until_s: float) -> None:
        """Give the client time to take its answers, before `fail`."""
        try:
            self._outbox.flush_until(until_s)
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
        self._memories.close(has_gone=self.has_hung_up)
        self.socket.close()
        self._outbox.parts.clear()
        self._server.closed(self)
        self._abandon_arriving()
        self._give_back(self._unsent_bytes)
        if self._client is not None:
            self._desk.detach(self._client)

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
        self._progress.received += received
        self._reader.received(received)
        self._work()

    def _receive_greeting(self) -> int:
        """A descriptor may come with HELLO; one that comes later is dropped by the kernel."""
        assert isinstance(self.socket, socket.socket)
        received, descriptors = receive_with_descriptors(self.socket, self._reader.buffer())
        self._memories.came(descriptors)
        return received

    def _work(self) -> None:
        """Handle the frames that are there, as long as their answers are taken."""
        self._held_back = False
        while not self._closed:
            if self._outbox.parts or self._in_flight >= MAX_IN_FLIGHT:
                self._held_back = True
                self._server.leave_line(self)  # if it waits for memory, it must not hold up others
                break
            if self.account is not None and self._is_over_quota(self.account):
                self._held_back = True
                self._server.delay(self)
                self._server.leave_line(self)
                break
            frame = self._reader.next()
            if frame is None:
                break
            self._progress.frames += 1
            if isinstance(frame, Rejected):
                self._refuse(frame)
                continue
            self._handle(frame)
            if frame.kind is Kind.REQUEST:  # some take long: the others come first
                self._server.resume(self)
                break
        self._update_events()

    def _is_over_quota(self, account: Account) -> bool:
        """Must what has not begun to arrive wait? What has begun is on its account already."""
        return not self._arriving.input_bytes and account.delay_s(self._server.engine.clock()) > 0

    def _admit(self, kind: Kind, meta: bytes, payload_bytes: int) -> Admitted:
        """Before memory is allocated: does the exchange fit the model's table, and the quota?"""
        found = self._fit(kind, meta, payload_bytes)
        if found is None:
            return Admitted()
        exchange, plan, placed = found
        memory_bytes, input_bytes = payload_bytes + plan.result_bytes, 0
        if memory_bytes <= FREE_BYTES:
            memory_bytes = 0
        elif not self._server.take(self, memory_bytes):
            self._held_back = True
            raise Postponed
        self._arriving = Taken(0, memory_bytes)  # to be given back if the account has no room
        if self.account is not None:
            input_bytes = offsets(exchange.specs)[1]
            self.account.begin(input_bytes, plan.rows, self._server.engine.clock())
        self._arriving = Taken(input_bytes, memory_bytes)
        specs = exchange.specs
        return Admitted(found, specs if placed is None else placed[1].inline(specs))

    def _abandon_arriving(self) -> None:
        """An exchange that was admitted will not be complete."""
        arriving, self._arriving = self._arriving, Taken()
        if self.account is not None:
            self.account.end(arriving.input_bytes)
        self._give_back(arriving.memory_bytes)

    def _give_back(self, memory_bytes: int) -> None:
        if memory_bytes:
            self._server.give_back(memory_bytes)

    def _fit(self, kind: Kind, meta: bytes, payload_bytes: int) -> Fitted | None:
        if (kind is Kind.HELLO) != (self._client is None):
            raise ProtocolError(f"unexpected {kind.name} frame: HELLO comes first, and once")
        if kind in _EXCHANGES:
            return self._fit_exchange(kind, meta, payload_bytes)
        if payload_bytes or kind not in (Kind.HELLO, Kind.REQUEST):
            raise ProtocolError(f"a client may not send a {kind.name} frame like this")
        return None

    def _fit_exchange(self, kind: Kind, meta: bytes, payload_bytes: int) -> Fitted:
        admission = self._server.admission
        if kind is Kind.EXCHANGE:
            exchange, plan, _ = admission.admit(meta, payload_bytes)
            placed = None
        else:
            size = self._memories.of(kind).size_bytes  # no name for it, lest a refusal keeps it
            exchange, plan, places = admission.admit_placed(meta, payload_bytes, size)
            placed = self._memories.of(kind), places
        if self._masked:
            only_ring((exchange,))
        return exchange, plan, placed

    def _refuse(self, rejected: Rejected) -> None:
        assert self._client is not None
        self._abandon_arriving()  # there was no memory for it
        self._server.engine.refused(self._client)
        self._send([error_frame(rejected.request, rejected.error)])

    def _handle(self, frame: Frame) -> None:
        if frame.kind in _EXCHANGES:
            assert isinstance(frame.found, tuple)
            self._exchange(frame, *frame.found)
        elif frame.kind is Kind.HELLO:
            self._greeted(frame.json())
        else:
            self._request(frame)

    def _greeted(self, hello: Json) -> None:
        arena = self._memories.map_arena(bool(hello.get("arena")))
        client, welcome = self._desk.attach(hello, self._transport, self._certificate_names())
        self._client = client
        self._server.greeted(self)
        self.account = self._server.engine.account_of(client)
        self._masked = hello.get("masked") is not None
        if arena is not None:
            welcome = {**welcome, "arena": arena}
        descriptor = None
        if hello.get("lend") and self._transport == "unix":
            assert isinstance(self.socket, socket.socket)
            if (lender := self._desk.lend(client, peer_of(self.socket))) is not None:
                descriptor, welcome = lender.descriptor, {**welcome, "lent": lender.table()}
        self._send([json_frame(Kind.WELCOME, 0, welcome)], descriptor)

    def _certificate_names(self) -> tuple[str, ...]:
        """Those that the client has shown."""
        return ()

    def _exchange(
        self, frame: Frame, exchange: Exchange, plan: Plan, placed: Placed | None
    ) -> None:
        assert self._client is not None
        self._in_flight += 1
        taken, self._arriving = self._arriving, Taken()
        self._count(bytes_in=len(frame.meta) + len(frame.payload))
        tensors, place = frame.tensors, None
        if placed is not None:
            arena, places = placed
            tensors = arena.inputs(places, exchange.specs, tensors)
            place = functools.partial(arena.place, places)
        try:
            self._server.engine.submit(
                self._client,
                exchange._replace(tensors=tensors, place=place),
                plan,
                lambda outcome: self._server.reply(self, frame.request, outcome, placed, taken),
            )
        except BaseException:
            self._arriving = taken  # nobody will answer it
            raise

    def _request(self, frame: Frame) -> None:
        assert self._client is not None
        engine, account = self._server.engine, self.account
        started_s = engine.clock()
        try:
            question = frame.json()
            if question.get("get") in _FREE_REQUESTS:
                account = None
            if account is not None:
                account.begin(0, 0, started_s)
            if question.get("get") == "memory":
                answer, payload = self._give_block(question), empty_payload(0)
            else:
                answer, payload = self._desk.answer(self._client, question)
        except SymbiosisError as error:
            self._send([error_frame(frame.request, error)])
            return
        if account is not None:
            engine.charge(account, engine.clock() - started_s)
        head = json_frame(Kind.REPLY, frame.request, answer, len(payload))
        self._send([head, as_bytes(payload)])

    def _give_block(self, question: Json) -> Json:
        if self._transport != "unix" or self._in_flight:
            raise RequestRefused("a device's memory: over a UNIX socket, and between exchanges")
        return self._memories.give_block(question)

    def _count(self, bytes_in: int = 0, bytes_out: int = 0) -> None:
        stats = self._server.engine.stats.clients.get(self._client or 0)
        if stats is not None:
            stats.bytes_in += bytes_in
            stats.bytes_out += bytes_out

    def _send(self, parts: list[bytes | memoryview], descriptor: int | None = None) -> None:
        if self._reader.checked:
            parts = checked(parts)
        self._outbox.put(
            parts, descriptor
        )  # whoever sends updates the events afterwards, or closes

    def _flush(self) -> None:
        self._progress.sent += self._outbox.flush()
        if self._unsent_bytes and not self._outbox.parts:
            unsent_bytes, self._unsent_bytes = self._unsent_bytes, 0
            self._give_back(unsent_bytes)
        if self._held_back and not self._outbox.parts:
            self._server.resume(self)
        self._update_events()

    @property
    def _is_busy(self) -> bool:
        """Nothing is read from it for now."""
        return bool(self._outbox.parts) or self._held_back or self._in_flight >= MAX_IN_FLIGHT

    def _update_events(self) -> None:
        if self._closed:
            return
        events = self._wanted_events()
        if events != self._events:
            self._events = events
            self._server.watch(self, events)

    def _wanted_events(self) -> int:
        if self._outbox.parts:
            return selectors.EVENT_WRITE
        return 0 if self._is_busy else selectors.EVENT_READ
