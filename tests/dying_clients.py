"""What clients do that are about to be killed. In a module that is quickly imported."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import torch

import raw
from raw import RawClient
from symbiosis import connect
from symbiosis.wire.exchange import NO_BIAS, Op

FIRST = 1  # the embedding, (304, 64)


def work(url: str, arena_bytes: int, begun: Connection) -> None:
    """Exchanges without end, a megabyte each."""
    torch.set_num_threads(1)
    session = connect(url, arena_bytes=arena_bytes)
    x = torch.randn(4000, 64)
    while True:
        session.product(Op.MATMUL, x, 2, (), NO_BIAS, forward=False)
        if not begun.closed:
            begun.send(1)
            begun.close()


def half_a_payload(url: str, begun: Connection) -> None:
    """A frame of 64 MiB of which half is sent, and exchanges that wait for their turn."""
    client = RawClient(url)
    meta = raw.exchange_meta(raw.EMBEDDING, (FIRST,), (1 << 24,), dtype=raw.INT32)
    client.send(raw.header(raw.EXCHANGE, 1, len(meta), 1 << 26) + meta + bytes(1 << 25))
    begun.send(1)
    time.sleep(600)
