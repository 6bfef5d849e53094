"""What an executor really receives and answers: a proxy in front of its socket.

Forwards every byte unchanged and reads the frames along with both ends. What it holds is what
the executor's operator holds: the attacks work on nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from symbiosis.transport.addresses import Address
from symbiosis.wire.exchange import Exchange, unpack_exchange, unpack_result
from symbiosis.wire.frames import Frame, FrameReader, Json, Kind, Limits
from symbiosis.wire.tensors import from_payload

_numbers = itertools.count(1)
_LIMITS = Limits(meta_bytes=1 << 28, payload_bytes=1 << 32)


class Seen(NamedTuple):
    """One exchange: what was asked, with its tensors, and what was answered."""

    asked: Exchange
    answers: tuple[Tensor, ...]


class Recorder:
    """Listens at ``url`` and passes on to the executor at ``upstream``, a ``unix://`` URL.

    Shared memory would go past it: connect with ``arena_bytes=0``. Threads: two for each
    connection; the lists are complete for whatever the client has had an answer to.
    """

    def __init__(self, folder: Path, upstream: str) -> None:
        path = folder / f"recorder-{next(_numbers)}.sock"
        self.url = f"unix://{path}"
        self.seen: list[Seen] = []
        self.asked: list[Exchange] = []  # answered or not
        self.requests: list[Json] = []
        self.frames: list[tuple[Kind, int]] = []  # what the client sent: kind, bytes in all
        self._upstream = Address.parse(upstream).path
        self._asked: dict[tuple[int, int], Exchange] = {}
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for open_socket in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
            open_socket.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self) -> None:
        for number in range(1 << 20):
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            executor = socket.socket(socket.AF_UNIX)
            assert self._upstream is not None
            try:
                executor.connect(self._upstream)
            except OSError:  # nobody is there: so much the client learns
                client.close()
                continue
            self._sockets += [client, executor]
            for source, sink in ((client, executor), (executor, client)):
                pump = threading.Thread(target=self._pump, args=(number, source, sink), daemon=True)
                pump.start()

    def _pump(self, number: int, source: socket.socket, sink: socket.socket) -> None:
        """Notes first, then forwards: who has an answer finds its exchange in `seen`."""
        reader = FrameReader(_LIMITS)
        try:
            while data := source.recv(1 << 20):
                for frame in _frames(reader, data):
                    self._note(number, frame)
                sink.sendall(data)
        except OSError:  # one of the ends has closed
            pass
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _note(self, number: int, frame: Frame) -> None:
        if frame.kind in (Kind.HELLO, Kind.REQUEST, Kind.EXCHANGE):
            self.frames.append((frame.kind, len(frame.meta) + len(frame.payload)))
        if frame.kind in (Kind.HELLO, Kind.REQUEST):
            self.requests.append(frame.json())
        elif frame.kind is Kind.EXCHANGE:
            exchange = unpack_exchange(frame.meta)
            exchange = exchange._replace(tensors=from_payload(frame.tensors[0], exchange.specs))
            self._asked[number, frame.request] = exchange
            self.asked.append(exchange)
        elif frame.kind is Kind.RESULT:
            _, specs = unpack_result(frame.meta)
            asked = self._asked.pop((number, frame.request))
            self.seen.append(Seen(asked, from_payload(frame.tensors[0], specs)))


def _frames(reader: FrameReader, data: bytes) -> Iterator[Frame]:
    rest = memoryview(data)
    while rest:
        room = reader.buffer()
        taken = min(len(room), len(rest))
        room[:taken] = rest[:taken]
        rest = rest[taken:]
        for frame in reader.advance(taken):
            assert isinstance(frame, Frame)
            yield frame


def rows(tensor: Tensor) -> Tensor:
    """(..., I) as (T, I)."""
    return tensor.reshape(-1, tensor.shape[-1])


def joined(seen: list[Seen], weight: int, *, op: int) -> tuple[Tensor, Tensor]:
    """All that ``op`` asked of ``weight``, and the answers: (T, I), (T, O), in order."""
    pairs = [
        (rows(one.asked.tensors[0]), rows(one.answers[one.asked.weights.index(weight)]))
        for one in seen
        if one.asked.op == op and weight in one.asked.weights
    ]
    assert pairs, f"operation {op} was never asked of weight {weight}"
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
