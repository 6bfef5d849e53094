"""What one exchange costs: from the autograd function to the result tensor, by size.

The executor is idle and the weight tiny (64 × 64), so nearly all of it is the path between two
processes; the executor's own computation (it comes with the result) is taken off. Input and
result have the given size each. Peer: the bare round trip of the same bytes between two Python
processes over a UNIX socket, received into buffers that exist already.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

import symbiosis
from harness import LLAMA_110M, executor, make_model, save

SIZES = {"8 KB": 8 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "8 MB": 8 << 20}
_FEATURES = 64
TINY = {
    **LLAMA_110M,
    "vocab_size": 256,
    "hidden_size": _FEATURES,
    "intermediate_size": _FEATURES,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}

Timer = Callable[[], float]
"""Runs one round trip; microseconds."""


def echo(connection: socket.socket, buffer: memoryview) -> None:
    """The other process of the bare round trip: u64 length, then so many bytes; sends them back."""
    head = memoryview(bytearray(8))
    while connection.recv_into(head, 8):
        size = int.from_bytes(head, "little")
        receive(connection, buffer[:size])
        connection.sendall(buffer[:size])


def receive(connection: socket.socket, into: memoryview) -> None:
    while into:
        into = into[connection.recv_into(into) :]


@contextmanager
def bare_peer() -> Iterator[Callable[[int], Timer]]:
    """Makes a timer for the bare round trip of a number of bytes."""
    here, there = socket.socketpair()
    for end in (here, there):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    buffer = memoryview(bytearray(max(SIZES.values())))
    child = os.fork()
    if not child:
        here.close()
        echo(there, buffer)
        os._exit(0)
    there.close()

    def timer(size: int) -> Timer:
        head, part = size.to_bytes(8, "little"), buffer[:size]

        def once() -> float:
            started_s = time.perf_counter()
            here.sendall(head)
            here.sendall(part)
            receive(here, part)
            return (time.perf_counter() - started_s) * 1e6

        return once

    yield timer
    here.close()
    os.waitpid(child, 0)


def exchange_timer(session: symbiosis.Session) -> Callable[[int], Timer]:
    """Makes a timer for a whole exchange of a number of bytes each way, compute taken off."""
    weight = session.model().model.layers[0].mlp.up_proj.weight

    def timer(size: int) -> Timer:
        x = torch.randn(size // _FEATURES // 4, _FEATURES, requires_grad=True)
        counters = session._counters

        def once() -> float:
            before = counters.compute_us
            started_s = time.perf_counter()
            y = F.linear(x, weight)
            elapsed_us = (time.perf_counter() - started_s) * 1e6
            assert y.shape == x.shape
            return elapsed_us - (counters.compute_us - before)

        return once

    return timer


def measure(timers: dict[str, Timer], rounds: int, block: int) -> dict[str, dict[str, float]]:
    """Blocks of the timers in turn; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for round_number in range(rounds + 1):
        for name, once in timers.items():
            values = [once() for _ in range(block)]
            if round_number:
                found[name] += values
    return {
        name: {"p50_us": statistics.median(v), "p90_us": statistics.quantiles(v, n=10)[-1]}
        for name, v in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"weight": f"{_FEATURES} × {_FEATURES}, fp32"}
    model = make_model("llama-tiny", TINY)
    with bare_peer() as bare, executor(model) as served:
        makers = {"bare": bare}
        for name, session in (
            ("unix, arena", symbiosis.connect(served.unix)),
            ("unix, socket", symbiosis.connect(served.unix, arena_bytes=0)),
            ("tcp", symbiosis.connect(served.tcp)),
        ):
            makers[name] = exchange_timer(session)
        print(f"{'':6} " + "".join(f"{name:>32}" for name in makers))
        for label, size in SIZES.items():
            timers = {name: make(size) for name, make in makers.items()}
            row = measure(timers, options.rounds, 100 if size < 1 << 20 else 20)
            bare_us = row["bare"]["p50_us"]
            cells = "".join(
                f"{r['p50_us']:13.0f} µs {r['p90_us']:6.0f} {r['p50_us'] / bare_us:6.1f}×"
                for r in row.values()
            )
            print(f"{label:6} {cells}", flush=True)
            result[label] = row
    print("p50, p90, and p50 over that of the bare round trip of the same bytes")
    if not options.no_save:
        save("exchange", result)


if __name__ == "__main__":
    main()
