"""The order of streams, by what torch is told: there is no GPU here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import tiny
from symbiosis import Executor, connect
from symbiosis.executor.streams import on_default

CUDA = torch.device("cuda", 0)


class Stream:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, where the caller's stream is not the default."""
    found: list[str] = []
    streams = {name: Stream(name, found) for name in ("default", "the caller's")}

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        found.append(f"on {stream.name}")
        yield
        found.append("as before")

    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["default"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["the caller's"])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return found


def test_the_default_stream_waits_for_the_caller_s_and_that_for_it(told: list[str]) -> None:
    assert on_default(CUDA, lambda: told.append("work"), lambda result: ()) is None
    assert told == [
        "default waits for the caller's",
        "on default",
        "work",
        "as before",
        "the caller's waits for default",
    ]


def test_nothing_to_order(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_default(torch.device("cpu"), lambda: 1, lambda result: ()) == 1
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.default_stream)
    assert on_default(CUDA, lambda: 2, lambda result: ()) == 2
    assert told == []


def test_an_exchange_within_the_process_is_ordered(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Executor.of(tiny.llama()) as executor, connect(executor) as session:
        model = session.model()
        monkeypatch.setattr(executor.weights, "wait", lambda: None)
        executor.weights.device = CUDA
        with torch.no_grad():
            model(tiny.tokens())
        assert told.count("on default") == session.stats().exchanges > 0
