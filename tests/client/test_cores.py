"""How threads wait, by what a session has counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import tiny
from symbiosis import connect
from symbiosis.client import cores
from symbiosis.client.cores import Cores
from symbiosis.client.counters import Counters

if TYPE_CHECKING:
    from conftest import Serve


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What threads are told, which stay awake briefly where they do."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    found: list[bool] = []
    monkeypatch.setattr(cores, "sleep_at_once", found.append)
    return found


def test_they_sleep_unless_a_client_trains_alone(said: list[bool]) -> None:
    counters, each_look = Counters(), Cores()
    assert said == [True]

    def looked(now_s: float, *, each: int, shared: bool = False, count: int = 100) -> list[bool]:
        """What is said after so many exchanges with inputs of ``each`` bytes."""
        said.clear()
        counters.exchanges += count
        counters.bytes_sent += count * each
        each_look.look(counters, now_s, shared)
        return list(said)

    assert looked(10.0, each=1_000_000) == [False]
    assert looked(12.0, each=1_000_000, shared=True) == [True]
    assert looked(14.0, each=1_000_000) == [False]
    assert looked(16.0, each=3072) == [True], "a decoder"
    assert looked(16.5, each=1_000_000) == [], "once a second"
    assert looked(18.0, each=1_000_000) == [False]
    assert looked(20.0, each=3072, count=7) == [], "too few to say anything"


@pytest.mark.parametrize("spins", ["", "100000", "INFINITY"])
def test_threads_that_would_stay_awake_for_long_sleep(
    said: list[bool], monkeypatch: pytest.MonkeyPatch, spins: str
) -> None:
    """Far into the exchange, they would take the executor's cores."""
    monkeypatch.setenv("GOMP_SPINCOUNT", spins)
    counters, looks = Counters(), Cores()
    counters.exchanges, counters.bytes_sent = 100, 100_000_000
    looks.look(counters, 10.0, False)
    assert said == [True, True]


@pytest.mark.parametrize("lend", [False, True])
def test_a_session_looks(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, said: list[bool], lend: bool
) -> None:
    """Beside an executor that computes; what is lent has its own rule."""
    monkeypatch.setattr(cores, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(cores, "MAX_INPUT_BYTES", 1024)
    _, url = serve(tiny.llama(), lend=lend)
    with connect(url) as session:
        model = session.model()
        for _ in range(3):
            model(torch.zeros(4, 64, dtype=torch.long), labels=torch.zeros(4, 64, dtype=torch.long))
    assert said == [] if lend else said[0] and False in said
