"""A TCP proxy that does to bytes what bad networks and bad middleboxes do."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from urllib.parse import urlsplit

FAULTS = ("delay", "cut", "truncate", "duplicate", "corrupt", "lose", "swallow")


class FaultyProxy:
    """Forwards from a port of its own to a ``tcp://`` URL; does harm from `harm` on.

    ``delay`` holds a chunk back; ``cut`` closes both sides at once; ``truncate`` forwards a part
    of a chunk and closes; ``duplicate`` sends a piece of a chunk twice; ``corrupt`` flips a bit;
    ``lose`` leaves a piece out; ``swallow`` takes all bytes of a connection from now on and
    forwards none, as a peer that has gone without a word.
    """

    def __init__(self, target: str, seed: int) -> None:
        parts = urlsplit(target)
        assert parts.hostname
        assert parts.port
        self._target = (parts.hostname, parts.port)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._faults: tuple[str, ...] = ()
        self._rate = 0.0
        self.done: dict[str, int] = dict.fromkeys(FAULTS, 0)
        """What has been done so far, by kind."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def harm(self, faults: tuple[str, ...], rate: float) -> None:
        """From now on do one of ``faults`` to a share ``rate`` of the chunks."""
        self._faults, self._rate = faults, rate

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in list(self._sockets):
            self._shut(each)
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets |= {client, server}
            self._start(self._forward, client, server)
            self._start(self._forward, server, client)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        swallowing = False
        try:
            while data := source.recv(1 << 16):
                fault = self._draw()
                swallowing = swallowing or fault == "swallow"
                if swallowing:
                    continue
                if fault == "cut":
                    break
                if fault == "truncate":
                    sink.sendall(data[: self._below(len(data))])
                    break
                sink.sendall(self._harmed(data, fault))
        except OSError:
            pass
        finally:
            self._shut(source)
            self._shut(sink)

    def _harmed(self, data: bytes, fault: str | None) -> bytes:
        at = self._below(len(data))
        length = 1 + self._below(64)
        match fault:
            case "delay":
                time.sleep(0.002 * (1 + self._below(50)))
            case "duplicate":
                return data[: at + length] + data[at:]
            case "lose":
                return data[:at] + data[at + length :]
            case "corrupt":
                flipped = data[at] ^ (1 << self._below(8))
                return data[:at] + bytes((flipped,)) + data[at + 1 :]
        return data

    def _draw(self) -> str | None:
        with self._lock:
            if not self._faults or self._random.random() >= self._rate:
                return None
            fault = self._random.choice(self._faults)
            self.done[fault] += 1
            return fault

    def _below(self, limit: int) -> int:
        with self._lock:
            return self._random.randrange(limit)

    def _shut(self, each: socket.socket) -> None:
        self._sockets.discard(each)
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
