"""How threads wait, by what a session has counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import symbiosis.client.cores
import tiny
from symbiosis import connect
from symbiosis.client.cores import Cores
from symbiosis.client.counters import Counters

if TYPE_CHECKING:
    from conftest import Serve


def test_they_sleep_unless_a_client_trains_alone() -> None:
    said: list[bool] = []
    counters, cores = Counters(), Cores(said.append)
    assert said == [True]

    def looked(now_s: float, *, each: int, shared: bool = False, count: int = 100) -> list[bool]:
        """What is said after so many exchanges with inputs of ``each`` bytes."""
        said.clear()
        counters.exchanges += count
        counters.bytes_sent += count * each
        cores.look(counters, now_s, shared)
        return list(said)

    assert looked(10.0, each=1_000_000) == [False]
    assert looked(12.0, each=1_000_000, shared=True) == [True]
    assert looked(14.0, each=1_000_000) == [False]
    assert looked(16.0, each=3072) == [True], "a decoder"
    assert looked(16.5, each=1_000_000) == [], "once a second"
    assert looked(18.0, each=1_000_000) == [False]
    assert looked(20.0, each=3072, count=7) == [], "too few to say anything"


@pytest.mark.parametrize("lend", [False, True])
def test_a_session_looks(serve: Serve, monkeypatch: pytest.MonkeyPatch, lend: bool) -> None:
    """Beside an executor that computes; what is lent has its own rule."""
    said: list[bool] = []
    monkeypatch.setattr(symbiosis.client.cores, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(symbiosis.client.cores, "_LARGE_BYTES", 1024)
    monkeypatch.setattr(Cores.__init__, "__defaults__", (said.append,))
    _, url = serve(tiny.llama(), lend=lend)
    with connect(url) as session:
        model = session.model()
        for _ in range(3):
            model(torch.zeros(4, 64, dtype=torch.long), labels=torch.zeros(4, 64, dtype=torch.long))
    assert said == [] if lend else said[0] and False in said
