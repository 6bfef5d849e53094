"""Addresses of executors, sockets that listen there, and what is set and asked of a connection."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import os
import socket
import stat
import struct
from urllib.parse import urlsplit

from symbiosis.errors import ConnectionFailed

DEFAULT_TCP_PORT = 7420
_BUFFER_BYTES = 4 << 20
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_GONE_AFTER_S = 60
_LIVENESS = [
    (getattr(socket, name), value)
    for name, value in (
        ("TCP_KEEPIDLE", _GONE_AFTER_S // 4),  # a peer that is waited for
        ("TCP_KEEPINTVL", _GONE_AFTER_S // 4),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * _GONE_AFTER_S),  # one that is sent to
    )
    if hasattr(socket, name)
]


@dataclasses.dataclass(frozen=True)
class Address:
    """``unix:///path/to.sock``, ``tcp://host:port`` or ``tls://host:port``."""

    path: str | None
    host: str
    port: int
    is_tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ConnectionFailed with the accepted forms."""
        if url.startswith("unix:///"):  # taken as it is: a path may hold any character
            return cls(url.removeprefix("unix://"), "", 0)
        try:
            parts = urlsplit(url)
            if parts.scheme in ("tcp", "tls") and parts.hostname:
                port = DEFAULT_TCP_PORT if parts.port is None else parts.port
                return cls(None, parts.hostname, port, parts.scheme == "tls")
        except ValueError:  # a port that is no number, half an IPv6 address
            pass
        raise ConnectionFailed(
            f"{url!r} is no address; write unix:///path.sock, tcp://host:port or tls://host:port"
        )

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.is_tls else 'tcp'}://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if no other machine can reach it."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may mean anything: 127.example.com
            return False


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket, and its address with the port that was given if port 0 was asked for.

    A UNIX socket that nobody answers on any more is replaced; a live one is not. Raises
    ConnectionFailed if the address is in use or not allowed.
    """
    try:
        if address.path is not None:
            return _listen_unix(address.path), address
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.create_server((address.host, address.port), family=family, backlog=256)
        return listener, dataclasses.replace(address, port=listener.getsockname()[1])
    except OSError as error:
        raise ConnectionFailed(f"cannot listen on {address}: {error.strerror or error}") from None


def _listen_unix(path: str) -> socket.socket:
    if os.path.exists(path):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConnectionFailed(f"cannot listen on unix://{path}: the path is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                raise ConnectionFailed(f"cannot listen on unix://{path}: it is in use")
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(256)
    except OSError:
        listener.close()
        raise
    return listener


def tune(connection: socket.socket) -> None:
    """No Nagle delay, large buffers; a peer whose machine has gone is noticed within a minute."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _LIVENESS:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    else:  # TCP sizes its own buffers
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


def peer_of(connection: socket.socket) -> int | None:
    """The process behind a UNIX socket, as the kernel says; None if it is of another namespace."""
    pid, _, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return pid or None
