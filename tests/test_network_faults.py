"""Through a network that delays, cuts, truncates, repeats, damages, loses and swallows bytes:
the very numbers of an undisturbed run, or an error that has a name; never a wrong number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tiny
from faulty_proxy import FAULTS, FaultyProxy
from symbiosis import Executor, connect
from symbiosis.errors import ConnectionFailed, ConnectionLost, ProtocolError

pytestmark = pytest.mark.timeout(120)

Serve = Callable[..., tuple[Executor, str]]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_numbers_are_those_of_an_undisturbed_run(serve: Serve, fault: str) -> None:
    """What is lost without an end of the connection is noticed by the silence that follows."""
    _, url = serve(tiny.llama(), tcp=True)
    local = tiny.llama().requires_grad_(False)
    rate = {"delay": 0.3, "swallow": 0.01, "lose": 0.01}.get(fault, 0.05)
    wanted_faults = 5 if rate < 0.02 else 20
    with FaultyProxy(url, seed=3) as proxy, connect(proxy.url, silence_s=0.3) as session:
        model = session.model().eval()
        proxy.harm((fault,), rate)
        for seed in range(500):
            ids = tiny.tokens(4, 32, seed)
            for ours, theirs in zip(tiny.step(model, ids), tiny.step(local, ids), strict=True):
                assert torch.equal(ours, theirs)
            if proxy.done[fault] >= wanted_faults and seed >= 3:
                break
        proxy.harm((), 0)
    assert proxy.done[fault] >= wanted_faults


def test_a_network_too_bad_to_use_is_an_error_with_a_name(serve: Serve) -> None:
    """Every chunk is damaged, or cut: patience ends."""
    _, url = serve(tiny.llama(), tcp=True)
    for faults in (("corrupt",), ("cut",), ("truncate", "duplicate")):
        with (
            FaultyProxy(url, seed=1) as proxy,
            connect(proxy.url, timeout_s=2, silence_s=0.5, retry_s=1.5) as session,
        ):
            model = session.model()
            proxy.harm(faults, 1.0)
            with pytest.raises((ConnectionLost, ConnectionFailed, ProtocolError)):
                model(tiny.tokens())


def test_connecting_through_a_bad_network_fails_with_a_name_or_is_right(serve: Serve) -> None:
    """The handshake, the table and the shipped parameters too are right or not there."""
    _, url = serve(tiny.llama(), tcp=True)
    local, ids = tiny.llama(), tiny.tokens()
    expected = local(ids).logits
    right = failed = 0
    with FaultyProxy(url, seed=5) as proxy:
        proxy.harm(("corrupt", "duplicate", "lose", "truncate"), 0.1)
        for _ in range(200):
            try:
                with connect(proxy.url, timeout_s=1, silence_s=0.3) as session:
                    assert torch.equal(session.model()(ids).logits, expected)
                right += 1
            except (ConnectionLost, ConnectionFailed, ProtocolError):
                failed += 1
            if right >= 3 and failed >= 3:
                break
    assert right >= 3
    assert failed >= 3
