"""A short run of ``make fuzz``: some thousand mutated frames, another seed for each kind."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.__main__ import feed, over_sockets
from fuzz.corpus import MAX_PAYLOAD, Corpus, corpus, executor
from fuzz.targets import ClientSide, Parser, seeded
from symbiosis import Executor
from symbiosis.wire.exchange import Op


@pytest.fixture(scope="module")
def base() -> Iterator[Executor]:
    with executor() as made:
        yield made


@pytest.fixture(scope="module")
def made(base: Executor) -> Corpus:
    seeded(0)
    return corpus(base)


def test_good_frames_are_good(base: Executor, made: Corpus) -> None:
    """Otherwise mutations of them would show nothing."""
    counts: collections.Counter[str] = collections.Counter()
    parser, chance = Parser(base, MAX_PAYLOAD), seeded(1)
    for good in made.exchanges:
        parser.feed(good.frame, chance, counts)
    assert counts["complete"] == len(made.exchanges)
    assert not counts["ended"] + counts["failed"] + counts["refused"]
    assert counts["computed"] > 40
    assert {good.exchange.op for good in made.exchanges if good.exchange} == set(Op)


def test_the_executors_reader(base: Executor, made: Corpus) -> None:
    counts = feed(
        Parser(base, MAX_PAYLOAD), made.hellos + made.requests + 4 * made.exchanges, 4000, seed=2
    )
    assert min(counts[what] for what in ("ended", "refused", "complete", "computed")) > 100


def test_the_clients_reader(made: Corpus) -> None:
    counts = feed(ClientSide(), made.answers, 2000, seed=3)
    assert min(counts["ended"], counts["complete"]) > 100


def test_the_server(base: Executor, made: Corpus, tmp_path: Path) -> None:
    (url,) = base.listen([f"unix://{tmp_path}/base.sock"])
    frames, counts = over_sockets(url, made, 250, seed=4)
    assert frames > 300
    assert min(counts[what] for what in ("answered", "ended", "unanswered")) > 20
