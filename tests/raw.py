"""A client that speaks bytes: frames written by hand, so that they can be wrong.

Written from the protocol's description, without the package's own packers.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import NamedTuple

HELLO, WELCOME, REQUEST, REPLY, EXCHANGE, RESULT, ERROR = range(1, 8)
LINEAR, MATMUL, BATCHED_MATMUL, GROUPED_MATMUL, EMBEDDING, CONVOLUTION = range(1, 7)
CHAIN = 8
FLOAT32, INT32, INT64 = 1, 5, 6

_HEADER = struct.Struct("<2sBBIQQ")


class Answer(NamedTuple):
    """A frame as it came."""

    kind: int
    request: int
    meta: bytes
    payload: bytes

    @property
    def code(self) -> str:
        """The code of an ERROR frame."""
        assert self.kind == ERROR, self
        return str(json.loads(self.meta)["code"])


def header(
    kind: int,
    request: int,
    meta_bytes: int,
    payload_bytes: int,
    *,
    magic: bytes = b"SY",
    version: int = 1,
) -> bytes:
    return _HEADER.pack(magic, version, kind, meta_bytes, request, payload_bytes)


def frame(kind: int, request: int, meta: bytes, payload: bytes = b"") -> bytes:
    return header(kind, request, len(meta), len(payload)) + meta + payload


def json_frame(kind: int, request: int, value: object) -> bytes:
    return frame(kind, request, json.dumps(value).encode())


def hello(**fields: object) -> bytes:
    return json_frame(HELLO, 0, {"protocol": 1, "client": "raw", **fields})


def exchange_meta(
    op: int,
    weights: tuple[int, ...],
    shape: tuple[int, ...],
    *,
    dtype: int = FLOAT32,
    biases: tuple[int, ...] = (),
    recipe: tuple[int, ...] = (),
    params: tuple[int, ...] = (),
    priority: int = 1,
) -> bytes:
    """The meta section of an EXCHANGE frame with one tensor."""
    ids = (*weights, *(biases or (0,) * len(weights)))
    return (
        struct.pack("<BBBBH", op, priority, len(weights), len(recipe), len(params))
        + struct.pack(f"<{len(ids)}I{len(recipe) + len(params)}q", *ids, *recipe, *params)
        + struct.pack(f"<BBB{len(shape)}I", 1, dtype, len(shape), *shape)
    )


class RawClient:
    """A blocking socket to an executor at a ``unix://`` or ``tcp://`` URL."""

    def __init__(self, url: str, *, greet: bool = True) -> None:
        self.socket = _dial(url)
        self.socket.settimeout(30)
        self.session = 0
        if greet:
            self.send(hello())
            welcome = self.receive()
            assert welcome.kind == WELCOME
            self.session = json.loads(welcome.meta)["session"]

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def exchange(self, request: int, meta: bytes, payload: bytes) -> None:
        self.send(frame(EXCHANGE, request, meta, payload))

    def receive(self) -> Answer:
        _, _, kind, meta_bytes, request, payload_bytes = _HEADER.unpack(self._read(_HEADER.size))
        return Answer(kind, request, self._read(meta_bytes), self._read(payload_bytes))

    def hung_up(self) -> bool:
        """True if the executor closes the connection; what it still says is read away."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            received = self.socket.recv(count - len(data))
            assert received, f"the executor hung up after {len(data)} of {count} bytes"
            data += received
        return data


def _dial(url: str) -> socket.socket:
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(rest)
        return connection
    host, _, port = rest.rpartition(":")
    return socket.create_connection((host, int(port)))
