"""How threads wait, by what a session has counted."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass
class Work:
    """What comes between two looks."""

    exchanges: int = 100
    bytes_sent: int = 1_000_000
    queue_us: int = 10
    compute_us: int = 3000

    def add_to(self, counters: Counters) -> None:
        counters.exchanges += self.exchanges
        for name in ("bytes_sent", "queue_us", "compute_us"):
            setattr(counters, name, getattr(counters, name) + self.exchanges * getattr(self, name))


def test_they_sleep_unless_a_client_trains_alone() -> None:
    said: list[bool] = []
    counters, cores, now_s = Counters(), Cores(said.append), 100.0
    assert said == [True]
    for work, asleep in (
        (Work(), False),
        (Work(queue_us=1000), True),  # others are served in between
        (Work(), False),
        (Work(bytes_sent=3072), True),  # a decoder
        (Work(bytes_sent=3072, queue_us=1000), True),
    ):
        work.add_to(counters)
        cores.look(counters, now_s)
        assert said.pop() is asleep
        now_s += 2
    said.clear()
    cores.look(counters, now_s)
    Work(exchanges=3).add_to(counters)
    cores.look(counters, now_s + 100)
    assert not said, "too few to say anything"
    Work().add_to(counters)
    cores.look(counters, now_s)
    Work().add_to(counters)
    cores.look(counters, now_s + 0.5)
    assert said == [False], "once a second"


@pytest.mark.parametrize("lend", [False, True])
def test_a_session_looks(serve: Serve, monkeypatch: pytest.MonkeyPatch, lend: bool) -> None:
    """Beside an executor that computes; what is lent has its own rule."""
    said: list[bool] = []
    monkeypatch.setattr(symbiosis.client.cores, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(symbiosis.client.cores, "_LARGE_BYTES", 1024)
    monkeypatch.setattr(symbiosis.client.cores, "_SHARE_OF_WAITING", 1.0)
    monkeypatch.setattr(Cores.__init__, "__defaults__", (said.append,))
    _, url = serve(tiny.llama(), lend=lend)
    with connect(url) as session:
        model = session.model()
        for _ in range(3):
            model(torch.zeros(4, 64, dtype=torch.long), labels=torch.zeros(4, 64, dtype=torch.long))
    assert said == [] if lend else said[0] and False in said
