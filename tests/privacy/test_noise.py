"""Noise by itself: how large it is, and that no input spoils a layer for those that follow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from symbiosis.client.noise import Noise
from symbiosis.wire.exchange import Op

W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
pools = pytest.mark.parametrize("pool", [None, 4])


def asked(noise: Noise, x: Tensor) -> tuple[Tensor, Tensor]:
    """What was sent, and what came of it."""
    sent: list[Tensor] = []

    def send(op: Op, weights: tuple[int, ...], rows: Tensor) -> tuple[Tensor, ...]:
        sent.append(rows)
        return (F.linear(rows, W),)

    (found,) = noise.products(Op.LINEAR, (1,), x, send)
    return sent[0], found


def noise_of(pool: int | None) -> Noise:
    return Noise(lambda _: W, 10.0, pool)


def check_usual(noise: Noise, x: Tensor) -> None:
    """Its noise is ten times the input, and comes off."""
    sent, found = asked(noise, x)
    rms = x.square().mean().sqrt()
    assert 5 < float((sent - x).square().mean().sqrt() / rms) < 20
    torch.testing.assert_close(found, F.linear(x, W), rtol=1e-3, atol=1e-3 * float(rms))


@pools
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_an_input_beyond_measure_spoils_itself_alone(pool: int | None, value: float) -> None:
    noise = noise_of(pool)
    asked(noise, torch.full((2, 8), value))
    bad = X.clone()
    bad[3, 4] = value
    _, found = asked(noise, bad)
    others = torch.arange(50) != 3
    torch.testing.assert_close(found[others], F.linear(X, W)[others], rtol=1e-3, atol=1e-3)
    check_usual(noise, X)


@pools
def test_rows_that_fill_a_bucket_say_nothing(pool: int | None) -> None:
    padded = F.pad(1e3 * X, (0, 0, 0, 950))
    noise = noise_of(pool)
    asked(noise, torch.zeros(3, 8))
    sent, _ = asked(noise, padded)
    added = (sent - padded).square().mean().sqrt() / X.square().mean().sqrt()
    assert 5e3 < float(added) < 20e3
    check_usual(noise, 1e3 * X)
