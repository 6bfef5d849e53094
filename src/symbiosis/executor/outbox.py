"""What a client has not taken yet: bytes that wait for its socket. Knows nothing of frames."""

from __future__ import annotations

import socket
import time
from collections import deque

from symbiosis.transport.tls import TlsSocket

_JOINED_BYTES = 1 << 16


class Outbox:
    """Sends at once what the socket takes, and keeps the rest in order."""

    def __init__(self, to: socket.socket | TlsSocket) -> None:
        self.parts: deque[memoryview] = deque()
        self._socket = to

    def put(self, parts: list[bytes | memoryview], descriptor: int | None = None) -> None:
        """Never blocks; that the peer has gone is for the next read to say. A ``descriptor`` goes
        along with the first byte, over a UNIX socket that nothing waits for."""
        if self.parts:
            self.parts.extend(map(memoryview, parts))
            return
        assert isinstance(self._socket, socket.socket)
        try:
            if descriptor is None:
                sent = self._socket.sendmsg(parts)
            else:
                sent = socket.send_fds(self._socket, parts, [descriptor])
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = sum(map(len, parts))
        for part in parts:
            if sent < len(part):
                self.parts.append(memoryview(part)[sent:])
            sent = max(0, sent - len(part))

    def flush(self) -> int:
        """Send on without blocking; how many bytes went. Raises OSError if the peer has gone."""
        total = 0
        while self.parts:
            try:
                sent = self._socket.send(self.parts[0])
            except BlockingIOError:
                break
            total += sent
            if sent == len(self.parts[0]):
                self.parts.popleft()
            else:
                self.parts[0] = self.parts[0][sent:]
        return total

    def flush_until(self, until_s: float) -> None:
        """Send on and wait for the peer, as long as there is time. Raises OSError."""
        while self.parts and (left_s := until_s - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
            self._socket.sendall(self.parts.popleft())
        self._socket.settimeout(0)


class EncryptedOutbox(Outbox):
    """Each send makes records of its own, so small parts go together."""

    def __init__(self, to: TlsSocket) -> None:
        super().__init__(to)
        self._tls = to

    def put(self, parts: list[bytes | memoryview], descriptor: int | None = None) -> None:
        assert descriptor is None
        if not self._tls.established:  # nothing can be said yet
            return
        if sum(map(len, parts)) <= _JOINED_BYTES:
            parts = [b"".join(parts)]
        idle = not self.parts
        self.parts.extend(memoryview(part) for part in parts if len(part))
        if idle:
            try:
                self.flush()
            except OSError:
                self.parts.clear()
