"""The long run: ``python -m tests.fuzz --frames 300000 --connections 10000``.

Prints what became of the frames, and how memory went. Ends with an error at the first frame that
raises what it should not; the seed and the number make it again.
"""

from __future__ import annotations

import argparse
import collections
import gc
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch

from fuzz.corpus import MAX_PAYLOAD, Corpus, corpus, executor
from fuzz.mutate import mutated
from fuzz.targets import ClientSide, Counts, Parser, Wire, seeded

MAX_GROWTH = 64 << 20
"""Bytes after the warm-up: caches of known size fill meanwhile."""


class Memory:
    """Resident memory, from the end of the warm-up on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._first = 0

    def warm(self) -> None:
        gc.collect()
        self._first = self._process.memory_info().rss

    @property
    def growth(self) -> int:
        gc.collect()
        return int(self._process.memory_info().rss - self._first)


def feed(target: Parser | ClientSide, goods: list, count: int, seed: int) -> Counts:  # type: ignore[type-arg]
    """``count`` mutated frames; raises with the number of the one that failed."""
    counts: Counts = collections.Counter()
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        frame = mutated(chance, chance.choice(goods), chance.choice(goods))
        try:
            target.feed(frame, chance, counts)
        except Exception as error:
            raise AssertionError(f"seed {seed}, frame {number}: {frame[:200]!r}") from error
    return counts


def over_sockets(url: str, made: Corpus, connections: int, seed: int) -> tuple[int, Counts]:
    """Mutated frames through a server's socket; how many."""
    counts: Counts = collections.Counter()
    wire, frames = Wire(url, made), 0
    try:
        for number in range(connections):
            frames += wire.connection(random.Random(f"{seed}/{number}"), counts)
            if number % 50 == 0:
                wire.check()
        wire.check()
    finally:
        wire.close()
    return frames, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=300_000)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeded(options.seed)
    with executor() as base, tempfile.TemporaryDirectory() as folder:
        made = corpus(base)
        (url,) = base.listen([f"unix://{folder}/base.sock"])
        ours = made.hellos + made.requests + 4 * made.exchanges
        runs = [("executor", Parser(base, MAX_PAYLOAD), ours, options.frames)]
        runs += [("client", ClientSide(), made.answers, options.frames // 6)]  # type: ignore[list-item]
        for name, target, goods, count in runs:
            memory, began_s = Memory(), time.monotonic()
            feed(target, goods, count // 5, options.seed + 1)
            memory.warm()
            counts = feed(target, goods, count, options.seed)
            report(name, count, counts, memory, time.monotonic() - began_s)
        memory, began_s = Memory(), time.monotonic()
        over_sockets(url, made, options.connections // 5, options.seed + 1)
        memory.warm()
        frames, counts = over_sockets(url, made, options.connections, options.seed)
        report("server", frames, counts, memory, time.monotonic() - began_s)


def report(name: str, frames: int, counts: Counts, memory: Memory, took_s: float) -> None:
    growth = memory.growth
    became = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(
        f"{name}: {frames} mutated frames in {took_s:.0f} s: {became}; "
        f"memory {growth / 1e6:+.1f} MB after the warm-up",
        flush=True,
    )
    assert growth < MAX_GROWTH, f"memory grew by {growth} bytes"


if __name__ == "__main__":
    main()
