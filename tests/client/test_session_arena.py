"""A session whose large tensors lie in memory that it shares with the executor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import tiny
from exchanges import weight_id
from symbiosis import Executor, Session, connect
from symbiosis.wire.exchange import NO_BIAS, Op

UP = "0.mlp.up_proj.weight"
Serve = Callable[..., tuple[Executor, str]]


def product(session: Session, executor: Executor, x: torch.Tensor) -> torch.Tensor:
    return session.product(Op.LINEAR, x, weight_id(executor, UP), (), NO_BIAS, forward=True)


def over_the_socket(session: Session) -> int:
    """Bytes in frames, both ways."""
    (client,) = session.executor_stats()["clients"].values()
    return int(client["bytes_in"] + client["bytes_out"])


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.mixtral, tiny.llama_with_biases])
def test_training_is_the_same_bit_for_bit_and_crosses_no_socket(
    serve: Serve, build: Callable[[], PreTrainedModel]
) -> None:
    _, url = serve(build())
    local = build().requires_grad_(False)
    ids = tiny.tokens(16, 48)  # 96 KiB for 32 features
    with connect(url) as session:
        model = session.model().eval()
        for _ in range(3):  # the first time results have no room
            before = session.stats(), over_the_socket(session)
            for ours, theirs in zip(tiny.step(model, ids), tiny.step(local, ids), strict=True):
                assert torch.equal(ours, theirs)
            after = session.stats(), over_the_socket(session)
        moved = sum(
            getattr(after[0], name) - getattr(before[0], name)
            for name in ("bytes_sent", "bytes_received")
        )
        assert moved > 4 << 20
        assert after[1] - before[1] < moved / 10


def test_results_outlive_the_session(executor: Executor, base_url: str) -> None:
    x = torch.randn(1000, 32)
    with connect(base_url) as session:
        found = [product(session, executor, x) for _ in range(3)]
    wanted = F.linear(x, executor.weights[weight_id(executor, UP)].tensor)
    assert all(torch.equal(y, wanted) for y in found)
    assert len({y.data_ptr() for y in found}) == 3
    found[0].add_(1)
    assert torch.equal(found[1], wanted)


def test_a_full_arena_falls_back_to_the_socket(executor: Executor, base_url: str) -> None:
    x = torch.randn(1000, 32)
    wanted = F.linear(x, executor.weights[weight_id(executor, UP)].tensor)
    with connect(base_url, arena_bytes=1 << 20) as session:
        kept = [product(session, executor, x) for _ in range(12)]
        assert all(torch.equal(y, wanted) for y in kept)


def test_no_such_memory_on_this_system(
    executor: Executor,
    base_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    x = torch.randn(1000, 32)
    with connect(base_url) as session:
        product(session, executor, x)
        assert over_the_socket(session) > x.nbytes
    assert "no memory to share" in caplog.text


def test_an_arena_that_the_executor_refuses(
    executor: Executor, base_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(1000, 32)
    with connect(base_url, arena_bytes=1 << 40) as session:
        product(session, executor, x)
        assert over_the_socket(session) > x.nbytes
    assert "takes no arena" in caplog.text


def test_a_new_executor_gets_a_new_arena(tmp_path: Path) -> None:
    """Results of the old one stay what they were."""
    x = torch.randn(1000, 32)
    url = f"unix://{tmp_path}/base.sock"
    executor = Executor.of(tiny.llama())
    executor.listen([url])
    session = connect(url, retry_s=0)
    old = [product(session, executor, x) for _ in range(3)]
    wanted = old[0].clone()
    executor.close()
    with pytest.raises(Exception, match=r"base\.sock|shutting down"):
        product(session, executor, x)
    with Executor.of(tiny.llama()) as second, session:
        second.listen([url])
        new = [product(session, second, x) for _ in range(3)]
        assert over_the_socket(session) < 3 * x.nbytes
        for y in (*old, *new):
            assert torch.equal(y, wanted)


def test_an_interrupted_exchange_does_not_disturb_later_ones(
    executor: Executor, base_url: str
) -> None:
    """What the executor still writes for it goes to memory that nobody uses."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    x = torch.randn(20000, 32)
    wanted = F.linear(x, executor.weights[weight_id(executor, UP)].tensor)
    interrupted = 0
    try:
        with connect(base_url) as session:
            for number in range(40):
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0002 * number)
                try:
                    found = product(session, executor, x)
                except KeyboardInterrupt:
                    interrupted += 1
                    continue
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert torch.equal(found, wanted)
            assert torch.equal(product(session, executor, x), wanted)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted


def test_a_default_device_of_the_caller_is_not_that_of_what_is_sent(serve: Serve) -> None:
    executor, url = serve(tiny.llama())
    with connect(url) as session:
        for rows in (3, 4096):  # 384 bytes, half a megabyte
            x = torch.randn(rows, 32)
            wanted = F.linear(x, executor.weights.view(weight_id(executor, UP), ()))
            for _ in range(2):  # the first time the result has no room
                with torch.device("meta"):
                    found = product(session, executor, x)
                assert torch.equal(found, wanted)
