"""Frames that an executor must not accept, by name; each is made for the executor at hand.

It hosts a tiny Llama and takes payloads of up to `MAX_PAYLOAD` bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import raw
import tiny
from exchanges import weight_id
from symbiosis import Executor

Make = Callable[[Executor], bytes]

MAX_PAYLOAD = 8 << 20
EMBED, QUERY, UP = "embed_tokens.weight", "0.self_attn.q_proj.weight", "0.mlp.up_proj.weight"


def weight(base: Executor, name: str) -> tuple[int, ...]:
    return (weight_id(base, name),)


def linear(base: Executor, rows: int = 2, **fields: object) -> bytes:
    """The meta section of a good exchange, but for ``fields``."""
    return raw.exchange_meta(raw.LINEAR, weight(base, QUERY), (rows, 32), **fields)  # type: ignore[arg-type]


def rows_of(value: float, rows: int = 2) -> bytes:
    """The payload that goes with `linear`."""
    return struct.pack(f"<{32 * rows}f", *[value] * (32 * rows))


ENDING: dict[str, Make] = {
    "unknown kind": lambda base: raw.frame(99, 1, b""),
    "kind of an answer": lambda base: raw.frame(raw.RESULT, 1, b""),
    "welcome from a client": lambda base: raw.json_frame(raw.WELCOME, 0, {}),
    "wrong magic": lambda base: raw.header(raw.REQUEST, 1, 0, 0, magic=b"XY"),
    "wrong version": lambda base: raw.header(raw.REQUEST, 1, 0, 0, version=2),
    "oversized meta": lambda base: raw.header(raw.REQUEST, 1, 0xFFFFFFFF, 0),
    "oversized payload": lambda base: raw.header(raw.EXCHANGE, 1, 10, MAX_PAYLOAD + 1),
    "huge payload": lambda base: raw.header(raw.EXCHANGE, 1, 10, 2**64 - 1),
    "second hello": lambda base: raw.hello(),
    "payload of another size": lambda base: raw.frame(raw.EXCHANGE, 1, linear(base), bytes(3)),
    "exchange cut short": lambda base: raw.frame(raw.EXCHANGE, 1, linear(base)[:-3]),
    "empty exchange": lambda base: raw.frame(raw.EXCHANGE, 1, b""),
    "malformed recipe": lambda base: raw.frame(
        raw.EXCHANGE, 1, linear(base, recipe=(1, 7)), rows_of(1.0)
    ),
    "parameters of a product": lambda base: raw.frame(
        raw.EXCHANGE, 1, linear(base, params=(1, 2)), rows_of(1.0)
    ),
    "more outputs of a chain than it has values": lambda base: raw.frame(
        raw.EXCHANGE,
        1,
        raw.exchange_meta(
            raw.CHAIN, weight(base, QUERY), (1, 32), params=(1, 1, 0, 0, 0, 0, *[0] * 300)
        ),
        rows_of(1.0, 1),
    ),
    "request with a payload": lambda base: raw.frame(raw.REQUEST, 1, b"{}", b"x"),
    "garbage": lambda base: b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
}
"""They end the connection."""

BEFORE_HELLO: dict[str, bytes] = {
    "exchange": raw.frame(raw.EXCHANGE, 1, b""),
    "request": raw.json_frame(raw.REQUEST, 1, {"get": "stats"}),
    "no json": raw.frame(raw.HELLO, 0, b"\xff{"),
    "no object": raw.frame(raw.HELLO, 0, b"[]"),
    "deep json": raw.frame(raw.HELLO, 0, b"[" * 60_000),
    "other protocol": raw.hello(protocol=77),
    "no protocol": raw.json_frame(raw.HELLO, 0, {}),
}
"""First frames of a connection that end it."""

REFUSED: dict[str, tuple[str, Make]] = {
    "huge dimension": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE, 7, raw.exchange_meta(raw.LINEAR, weight(base, QUERY), (0, 0xFFFFFFFF))
        ),
    ),
    "huge dimensions of nothing": (
        "",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(raw.LINEAR, weight(base, QUERY), (0xFFFFFFFF,) * 6 + (0, 32)),
        ),
    ),
    "huge lookup of nothing": (
        "",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(
                raw.EMBEDDING, weight(base, EMBED), (0xFFFFFFFF,) * 7 + (0,), dtype=raw.INT32
            ),
        ),
    ),
    "a result of nine dimensions": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(raw.EMBEDDING, weight(base, EMBED), (1,) * 8, dtype=raw.INT64),
            bytes(8),
        ),
    ),
    "view of a weight that a kernel would copy": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(
                raw.LINEAR,
                weight(base, UP),
                (1, 1 << 20),
                recipe=(4, 4, 1, 0, 1, 1, 8, 2, 64, 1 << 20),
            ),
            bytes(4 << 20),
        ),
    ),
    "weight without columns": (
        "",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(raw.LINEAR, weight(base, UP), (100, 0), recipe=(4, 4, 1, 0, 0, 1)),
        ),
    ),
    "wrong dtype": (
        "invalid-input",
        lambda base: raw.frame(raw.EXCHANGE, 7, linear(base, dtype=raw.INT32), rows_of(1.0)),
    ),
    "wrong shape": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE, 7, raw.exchange_meta(raw.LINEAR, weight(base, QUERY), (2, 3)), bytes(24)
        ),
    ),
    "weight that does not exist": (
        "unknown-weight",
        lambda base: raw.frame(
            raw.EXCHANGE, 7, raw.exchange_meta(raw.LINEAR, (4096,), (2, 32)), rows_of(1.0)
        ),
    ),
    "bias that does not exist": (
        "unknown-weight",
        lambda base: raw.frame(raw.EXCHANGE, 7, linear(base, biases=(77,)), rows_of(1.0)),
    ),
    "convolution's bias that does not exist": (
        "unknown-weight",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(
                raw.CONVOLUTION,
                weight(base, QUERY),
                (1, 32, 4),
                biases=(77,),
                recipe=(6, 1, 2),
                params=(1, 1, 0, 1, 0, 0, 1),
            ),
            bytes(512),
        ),
    ),
    "bias on a single number": (
        "",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            linear(base, biases=(1,), recipe=(3, 2, 0, 0, 3, 2, 0, 0)),
            rows_of(1.0),
        ),
    ),
    "convolution with a stride of 0": (
        "",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(
                raw.CONVOLUTION,
                weight(base, QUERY),
                (1, 32, 4),
                recipe=(6, 1, 2),
                params=(1, 0, 0, 1, 0, 0, 1),
            ),
            bytes(512),
        ),
    ),
    "operation not on the list": (
        "unknown-operation",
        lambda base: raw.frame(
            raw.EXCHANGE, 7, raw.exchange_meta(200, weight(base, QUERY), (2, 32)), rows_of(1.0)
        ),
    ),
    "recipe that does not fit": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE, 7, linear(base, recipe=(3, 2, 0, 10**9)), rows_of(1.0)
        ),
    ),
    "result over the limit": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            linear(base, recipe=(3, 2, 0, 0, 8, 2, 1 << 22, 32)),
            rows_of(1.0),
        ),
    ),
    "token id out of range": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(raw.EMBEDDING, weight(base, EMBED), (2,), dtype=raw.INT64),
            struct.pack("<2q", 3, tiny.VOCABULARY),
        ),
    ),
    "negative token id": (
        "invalid-input",
        lambda base: raw.frame(
            raw.EXCHANGE,
            7,
            raw.exchange_meta(raw.EMBEDDING, weight(base, EMBED), (2,), dtype=raw.INT32),
            struct.pack("<2i", 3, -1),
        ),
    ),
    "unknown request": ("protocol", lambda base: raw.json_frame(raw.REQUEST, 7, {"get": "root"})),
    "request without json": ("protocol", lambda base: raw.frame(raw.REQUEST, 7, b"\x80")),
    "request of deep json": ("protocol", lambda base: raw.frame(raw.REQUEST, 7, b"[" * 60_000)),
    "weight of no number": (
        "unknown-weight",
        lambda base: raw.json_frame(raw.REQUEST, 7, {"get": "weight", "id": [1]}),
    ),
}
"""They are answered with an error of this code, or in any way where none is given; then the
session goes on."""
