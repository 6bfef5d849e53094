"""A client's blocking channel to an executor, over a UNIX, TCP or TLS socket.

Payload bytes go from the tensor's memory to the kernel and from there into the result's memory;
nothing is pickled and nothing else is copied. Large tensors between processes of one host lie in
memory that both have mapped (`arena`), or that of a GPU in some of it (`device_arena`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import sys
from collections.abc import Sequence

import torch

from symbiosis.errors import (
    ConnectionFailed,
    ConnectionLost,
    InvalidInput,
    ProtocolError,
    QuotaExceeded,
    SymbiosisError,
    from_code,
)
from symbiosis.transport import device_memory
from symbiosis.transport.addresses import Address, tune
from symbiosis.transport.arena import Arena, Laid, ResultSizes, receive_with_descriptors
from symbiosis.transport.device_arena import DeviceArena, bytes_needed
from symbiosis.transport.lent import Lent
from symbiosis.transport.tls import Secret, Tls, client_context, reason_of, secure
from symbiosis.wire.checksums import checked
from symbiosis.wire.exchange import Exchange, Result, pack_exchange, unpack_result
from symbiosis.wire.frames import (
    Admitted,
    Frame,
    FrameReader,
    Json,
    Kind,
    Limits,
    Rejected,
    exchange_parts,
    json_frame,
)
from symbiosis.wire.places import pack_places
from symbiosis.wire.tensors import TensorSpec, offsets

logger = logging.getLogger(__name__)

_CLIENT_LIMITS = Limits(meta_bytes=256 << 20, payload_bytes=1 << 40)
_JOINED_BYTES = 1 << 16


def _check_trust(address: Address, key: Secret | None, tls: Tls | None) -> None:
    """Raises ConnectionFailed before anything is sent that others could read."""
    if tls is not None and not address.is_tls:
        raise ConnectionFailed(
            f"tls is given, but {address} is not encrypted: write tls://host:port"
        )
    if key is not None and not address.is_tls and not address.is_loopback:
        raise ConnectionFailed(
            f"the key is not sent to {address}, where everybody on the way could read it: "
            f"use tls://{address.host}:{address.port}"
        )


def _hung_up(address: Address, tls: Tls | None, error: ConnectionLost) -> str:
    text = f"{address} accepted the connection and hung up: {error}"
    if address.is_tls and (tls is None or tls.cert is None):
        text += "; perhaps it asks for a client certificate (tls=Tls(cert=...), --tls-cert)"
    elif address.is_tls:
        text += "; perhaps it does not trust the client's certificate"
    return text


class SocketChannel:
    """A client's blocking connection to an executor; see `Channel`."""

    def __init__(
        self,
        url: str,
        hello: Json,
        *,
        timeout_s: float = 10.0,
        silence_s: float | None = None,
        arena_bytes: int = 0,
        borrow: bool = False,
        key: Secret | None = None,
        tls: Tls | None = None,
    ) -> None:
        """Connect and shake hands within ``timeout_s``; later, an executor that moves no byte for
        ``silence_s`` in mid-exchange counts as lost, if that is given.

        ``arena_bytes`` is the address space of the memory that is shared with an executor behind
        a UNIX socket, 0 for none, nor a GPU's; without it everything goes through the socket.
        ``borrow`` takes the weights that such an executor lends. ``key`` goes into the greeting.
        Raises ConnectionFailed, AuthenticationFailed, QuotaExceeded, ProtocolError.
        """
        self._url = url
        self._request = 0
        self._awaited = _Awaited()
        address = Address.parse(url)
        _check_trust(address, key, tls)
        self._socket = self._dial(address, timeout_s, tls or Tls())
        self._checked = address.path is None and not address.is_tls  # which checks by itself
        self._reader = FrameReader(_CLIENT_LIMITS, self._awaited.admit, checked=self._checked)
        self._arena = self._make_arena(arena_bytes)
        shares = bool(arena_bytes) and address.path is not None
        self._sizes = ResultSizes() if shares else None  # without: everything is sent
        self._on_device: DeviceArena | None = None
        self._most_on_device = sys.maxsize  # beyond which no block is asked for
        self.lent: Lent | None = None
        self._borrowing = borrow and address.path is not None
        self._descriptor = -1  # of the memory that is lent, until it is mapped
        if self._borrowing:
            hello = {**hello, "lend": True}
        try:
            self._greet(hello if key is None else {**hello, "key": key.value})
            self.welcome = self._expect(Kind.WELCOME).json()
            if self._borrowing:
                self._borrow(self.welcome.pop("lent", None))
            limit = self.welcome.get("max_payload_bytes")
            self._max_payload_bytes = limit if isinstance(limit, int) else 1 << 30
        except ConnectionLost as error:
            self.close()
            raise ConnectionFailed(_hung_up(address, tls, error)) from None
        except BaseException:
            self.close()
            raise
        if self._arena is not None:
            self._arena.close_descriptor()
            if self.welcome.get("arena") is not True:
                logger.warning("%s takes no arena: %s", url, self.welcome.get("arena"))
                self._arena = None
        self._socket.settimeout(silence_s)

    def exchange(self, exchange: Exchange) -> Result:
        if offsets(exchange.specs)[1] > self._max_payload_bytes:
            raise InvalidInput(
                f"an input of {', '.join(map(str, exchange.specs))} exceeds the executor's limit "
                f"of {self._max_payload_bytes} bytes: use a smaller batch or shorter sequences"
            )
        meta = pack_exchange(exchange)
        tensors, specs, kind = exchange.tensors, exchange.specs, Kind.EXCHANGE
        product, elements = exchange[:5], tensors[0].numel()
        if self._sizes is not None:
            expected = self._sizes.expected(product, elements)
            laid, kind = self._lay_out(tensors, specs, expected)
            if laid is not None:
                tensors, specs = laid.inline, laid.places.inline(specs)
                meta = pack_places(laid.places) + meta
            self._awaited.laid = laid
        self._request += 1
        if tensors and not tensors[0].is_cpu:
            tensors = tuple(tensor.cpu() for tensor in tensors)
        parts = exchange_parts(kind, self._request, meta, specs, tensors)
        self._send(parts)
        try:
            frame = self._expect(Kind.RESULT)
        except SymbiosisError:  # refused, or nobody is there: nobody uses the places any more
            self._awaited.laid = None
            raise
        assert isinstance(frame.found, tuple)
        result, specs = frame.found
        if self._sizes is not None:
            self._sizes.learn(product, elements, specs)
            if self._awaited.laid is not None:
                found = self._awaited.laid.results(specs, frame.tensors)
                self._awaited.laid = None
                return Result(found, *result[1:])
        return Result(frame.tensors, *result[1:])

    def _lay_out(
        self,
        tensors: tuple[torch.Tensor, ...],
        specs: tuple[TensorSpec, ...],
        expected: Sequence[int],
    ) -> tuple[Laid | None, Kind]:
        """Where an exchange's tensors lie, if not in the frame, and the kind that says so."""
        laid = None
        if tensors[0].device.type in device_memory.EXCHANGED:
            if self._on_device is not None:
                laid = self._on_device.lay_out(tensors, specs, expected)
            if laid is None and self._has_grown(tensors[0].device, bytes_needed(specs, expected)):
                assert self._on_device is not None
                laid = self._on_device.lay_out(tensors, specs, expected)
            if laid is not None:
                return laid, Kind.ON_DEVICE
        if self._arena is not None:
            laid = self._arena.lay_out(tensors, specs, expected)
        return laid, Kind.EXCHANGE if laid is None else Kind.PLACED

    def _has_grown(self, device: torch.device, num_bytes: int) -> bool:
        """Ask for a larger block of the executor's device, if this process can use that too, in
        place of the one before. Of what is refused no more is asked for; the one before stays."""
        present = 0 if self._on_device is None else self._on_device.size_bytes
        if not present < num_bytes <= self._most_on_device:
            return False
        try:
            visible = device_memory.devices_like(device)
            question: Json = {"get": "memory", "devices": list(visible), "bytes": num_bytes}
            told, _ = self.request(question)
            self._on_device = None
            block = device_memory.attach(told, visible[str(told["device"])])
        except ConnectionLost:
            raise
        except QuotaExceeded as error:
            logger.info("%s: %s: they go through the host's memory", self._url, error)
            self._most_on_device = num_bytes // 2
        except (SymbiosisError, KeyError, RuntimeError) as error:
            logger.info("%s: activations go through the host's memory: %s", self._url, error)
            self._most_on_device, self._on_device = 0, None
            self.request({"get": "memory", "devices": [], "bytes": 0})  # it was not attached
        else:
            self._on_device = DeviceArena(block)
            return True
        return False

    def request(self, question: Json) -> tuple[Json, torch.Tensor]:
        self._request += 1
        self._send([json_frame(Kind.REQUEST, self._request, question)])
        frame = self._expect(Kind.REPLY)
        return frame.json(), frame.tensors[0]

    def _borrow(self, table: object) -> None:
        self._borrowing = False
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                self.lent = Lent(descriptor, table)
            except OSError as error:
                logger.warning("what %s lends is not taken, so it computes: %s", self._url, error)

    def close(self) -> None:
        if self._on_device is not None:  # which goes to another client as soon as we have gone
            with contextlib.suppress(RuntimeError):
                self._on_device.finish()
        self._socket.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._arena is not None:
            self._arena.close()
        self._arena = self._on_device = self._awaited.laid = None  # tensors there keep the memory

    def _make_arena(self, arena_bytes: int) -> Arena | None:
        if not arena_bytes or self._socket.family != socket.AF_UNIX:
            return None
        try:
            return Arena(arena_bytes)
        except (OSError, AttributeError, ValueError) as error:
            logger.warning(
                "no memory to share with %s, so everything is sent: %s", self._url, error
            )
            return None

    def _greet(self, hello: Json) -> None:
        if self._arena is None:
            self._send([json_frame(Kind.HELLO, 0, hello)])
            return
        greeting = json_frame(Kind.HELLO, 0, {**hello, "arena": True})
        try:
            sent = socket.send_fds(self._socket, [greeting], [self._arena.descriptor])
        except OSError as error:
            raise self._lost(error) from None
        if sent < len(greeting):  # sending nothing fails if the executor has hung up already
            self._send([memoryview(greeting)[sent:]])

    def _dial(self, address: Address, timeout_s: float, tls: Tls) -> socket.socket:
        context = client_context(tls) if address.is_tls else None  # its files come first
        try:
            if address.path is not None:
                connection = socket.socket(socket.AF_UNIX)
                try:
                    connection.settimeout(timeout_s)
                    connection.connect(address.path)
                except OSError:
                    connection.close()
                    raise
            else:
                connection = socket.create_connection((address.host, address.port), timeout_s)
        except OSError as error:
            raise ConnectionFailed(
                f"no executor answers at {self._url} ({error.strerror or error}); start one with "
                f"`symbiosis serve MODEL --listen {self._url}`"
            ) from None
        tune(connection)
        if context is not None:
            return secure(connection, context, address.host, self._url)
        return connection

    def _send(self, parts: list[bytes | memoryview]) -> None:
        if self._checked:
            parts = checked(parts)
        try:
            if isinstance(self._socket, ssl.SSLSocket):  # has no sendmsg
                self._send_encrypted(self._socket, parts)
                return
            sent = self._socket.sendmsg(parts)
            if sent == sum(map(len, parts)):
                return
            for part in parts:
                if sent >= len(part):
                    sent -= len(part)
                    continue
                self._socket.sendall(memoryview(part)[sent:])
                sent = 0
        except OSError as error:
            raise self._lost(error) from None

    def _send_encrypted(self, connection: ssl.SSLSocket, parts: list[bytes | memoryview]) -> None:
        """Each call makes records of its own, so small parts go together."""
        if sum(map(len, parts)) <= _JOINED_BYTES:
            parts = [b"".join(parts)]
        for part in parts:
            connection.sendall(part)

    def _expect(self, kind: Kind) -> Frame:
        """The frame that answers the request just sent."""
        frame = self._receive()
        if frame.kind is Kind.ERROR:
            told = frame.json()
            if not frame.request:  # the connection is meant, not this request
                self.close()
            raise from_code(str(told.get("code")), str(told.get("message")))
        if frame.kind is not kind or frame.request != self._request:
            self.close()
            raise ProtocolError(
                f"{self._url} answered request {self._request} with {frame.kind.name} "
                f"{frame.request}, not {kind.name}"
            )
        return frame

    def _receive(self) -> Frame:
        while (frame := self._reader.next()) is None:
            try:
                if self._borrowing:
                    received = self._receive_with_memory()
                else:
                    received = self._socket.recv_into(self._reader.buffer())
            except OSError as error:
                raise self._lost(error) from None
            if not received:
                raise self._lost(None)
            self._reader.received(received)
        if isinstance(frame, Rejected):  # there is no memory for the answer
            self.close()
            raise frame.error
        return frame

    def _receive_with_memory(self) -> int:
        """While the WELCOME is awaited, with which the executor hands over its memory."""
        received, descriptors = receive_with_descriptors(self._socket, self._reader.buffer())
        for descriptor in descriptors:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = descriptor
        return received

    def _lost(self, error: OSError | None) -> SymbiosisError:
        self.close()
        reason = f": {reason_of(error)}" if error else ""
        return ConnectionLost(f"the executor at {self._url} has gone{reason}")


class _Awaited:
    """What the reader must know of the exchange under way. (Not the channel itself: a cycle
    would keep a forgotten channel's socket open.)"""

    def __init__(self) -> None:
        self.laid: Laid | None = None

    def admit(self, kind: Kind, meta: bytes, payload_bytes: int) -> Admitted:
        """See `Admit`."""
        if kind is not Kind.RESULT:
            return Admitted()
        result, specs = unpack_result(meta)
        inline = specs if self.laid is None else self.laid.outside(specs)
        if offsets(inline)[1] != payload_bytes:
            raise ProtocolError("a result's payload does not fit its description")
        return Admitted((result, specs), inline)
