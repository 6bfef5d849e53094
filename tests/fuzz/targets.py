"""Where mutated frames go: the reader with admission and computation, a client's reader, and a
whole server through its socket. Each raises what it did not expect.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import random
import select
import socket

import torch

import raw
from fuzz.corpus import Corpus, Good
from fuzz.mutate import mutated
from symbiosis import Executor
from symbiosis.client.welcome import unpack_files, vector_table, weight_table
from symbiosis.errors import ProtocolError, SymbiosisError, from_code
from symbiosis.executor.admission import Admission
from symbiosis.executor.ops import check_values
from symbiosis.transport import sockets
from symbiosis.wire.digest import read_entries
from symbiosis.wire.frames import Admitted, Frame, FrameReader, Kind, Limits, Rejected

Counts = collections.Counter[str]


class Parser:
    """An executor without sockets: reader, admission, values, computation."""

    def __init__(self, base: Executor, max_payload: int) -> None:
        self._base = base
        self._limits = Limits(payload_bytes=max_payload)
        self._admission = Admission(base._engine, self._limits)
        self._client, _ = base.attach({"protocol": 1})

    def feed(self, data: bytes, chance: random.Random, counts: Counts) -> None:
        """In pieces of any size; anything but a SymbiosisError comes out."""
        reader = FrameReader(self._limits, self._admit)
        at = 0
        try:
            while at < len(data):
                room = reader.buffer()
                size = min(len(room), len(data) - at, chance.choice((1, 7, 64, 1 << 16, 1 << 16)))
                room[:size] = data[at : at + size]
                at += size
                for found in reader.advance(size):
                    counts["refused" if isinstance(found, Rejected) else "complete"] += 1
                    if isinstance(found, Frame):
                        self._handle(found, counts)
        except ProtocolError:
            counts["ended"] += 1

    def _admit(self, kind: Kind, meta: bytes, payload_bytes: int) -> Admitted:
        if kind is Kind.EXCHANGE:
            found = self._admission.admit(meta, payload_bytes)
            return Admitted(found, found[0].specs)
        if kind in (Kind.PLACED, Kind.ON_DEVICE):
            exchange, plan, places = self._admission.admit_placed(meta, payload_bytes, 1 << 20)
            return Admitted((exchange, plan, places), places.inline(exchange.specs))
        if payload_bytes or kind not in (Kind.HELLO, Kind.REQUEST):
            raise ProtocolError("not from a client")
        return Admitted()

    def _handle(self, frame: Frame, counts: Counts) -> None:
        try:
            if frame.kind is Kind.EXCHANGE:
                exchange, plan, _ = frame.found  # type: ignore[misc]
                full = exchange._replace(tensors=frame.tensors)
                check_values(full, plan)
                outcome = self._base.compute(self._client, full)
                counts["failed" if isinstance(outcome, SymbiosisError) else "computed"] += 1
            elif frame.kind is Kind.HELLO:
                client, _ = self._base.attach(frame.json())
                self._base.detach(client)
            elif frame.kind is Kind.REQUEST:
                self._base.answer(self._client, frame.json())
        except SymbiosisError:
            counts["refused"] += 1


class ClientSide:
    """What an executor that lies can do to a client's reader."""

    def feed(self, data: bytes, chance: random.Random, counts: Counts) -> None:
        reader = FrameReader(sockets._CLIENT_LIMITS, sockets._Awaited().admit)
        at = 0
        try:
            while at < len(data):
                room = reader.buffer()
                size = min(len(room), len(data) - at, chance.choice((1, 64, 1 << 16)))
                room[:size] = data[at : at + size]
                at += size
                for frame in reader.advance(size):
                    counts["complete"] += 1
                    if isinstance(frame, Frame):
                        _understand(frame)
        except SymbiosisError:
            counts["ended"] += 1


def _understand(frame: Frame) -> None:
    """As a session does."""
    if frame.kind is Kind.RESULT:
        return
    if frame.kind in (Kind.HELLO, Kind.EXCHANGE, Kind.PLACED, Kind.ON_DEVICE, Kind.REQUEST):
        return
    told = frame.json()
    if frame.kind is Kind.ERROR:
        raise from_code(str(told.get("code")), str(told.get("message")))
    if frame.kind is Kind.WELCOME:
        weight_table(told)
        vector_table(told)
        return
    with contextlib.suppress(SymbiosisError):
        read_entries(told)
    unpack_files(told, bytes(frame.payload))


class Wire:
    """A server behind its socket; after each ruined connection a good one must be served."""

    def __init__(self, url: str, corpus: Corpus) -> None:
        self._url = url
        self._corpus = corpus
        self.errors = _Errors()
        logging.getLogger("symbiosis").addHandler(self.errors)

    def close(self) -> None:
        logging.getLogger("symbiosis").removeHandler(self.errors)

    def connection(self, chance: random.Random, counts: Counts) -> int:
        """Mutated frames to one connection until it ends, or waits for the rest of one (it would
        swallow the next); how many."""
        greets = chance.random() < 0.85
        sent = 0
        client = raw.RawClient(self._url, greet=greets)
        with client:
            client.socket.settimeout(0.0)
            for _ in range(12 if greets else 1):
                good, other = self._pick(chance, greets)
                sent += 1
                became = _pushed(client.socket, mutated(chance, good, other))
                counts[became] += 1
                if became != "answered":
                    break
        return sent

    def check(self) -> None:
        """Somebody who behaves is served, and nothing was an error of ours."""
        assert not self.errors.seen, self.errors.seen[:3]
        with raw.RawClient(self._url) as client:
            client.send(raw.json_frame(raw.REQUEST, 9, {"get": "stats"}))
            answer = client.receive()
            assert (answer.kind, answer.request) == (raw.REPLY, 9)
            waiting = json.loads(answer.meta)["waiting"]
            assert waiting <= 16 * 64, waiting

    def _pick(self, chance: random.Random, greets: bool) -> tuple[Good, Good]:
        sets = (self._corpus.exchanges, self._corpus.exchanges, self._corpus.requests)
        good = chance.choice(chance.choice(sets) if greets else self._corpus.hellos)
        return good, chance.choice(chance.choice((*sets, self._corpus.hellos)))


class _Errors(logging.Handler):
    """Whatever the package logs as an error is one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))


def _pushed(connection: socket.socket, data: bytes) -> str:
    """Send it, give the server a moment, and take what comes: ``answered``, ``ended``, or
    ``unanswered``, which is right for a frame that is not complete."""
    at, became = 0, "unanswered"
    try:
        for _ in range(400):
            wants = [connection] if at < len(data) else []
            readable, writable, _ = select.select([connection], wants, [], 0.004)
            if writable:
                at += connection.send(data[at:])
            if readable:
                if connection.recv(1 << 16) == b"":
                    return "ended"
                became = "answered"
            if not wants and not readable:
                break
    except OSError:
        return "ended"
    return became


def seeded(seed: int) -> random.Random:
    """The same mutations again; torch's generator too."""
    torch.manual_seed(seed)
    return random.Random(seed)
