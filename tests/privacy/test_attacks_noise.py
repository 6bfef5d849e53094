"""The published scheme, additive float noise, and what its cheap forms are worth: nothing.

First on the mode `noise` as it is, then on the real traffic of a client in `plain` with noise
added as the scheme adds it.
"""

from __future__ import annotations

import attacks
import pytest
import torch
from recorder import joined
from torch import Tensor
from traffic import VOCABULARY, Record, Traffic

from symbiosis import Privacy
from symbiosis.wire.exchange import Op

SIGMA = 1000.0
"""Noise against the activation, both by their root mean square."""


@pytest.fixture(scope="module")
def first(plain: Traffic) -> Tensor:
    """(T, d): the first layer's input, as sent."""
    x, _ = joined(plain.forward, plain.weight("0.self_attn.q_proj"), op=Op.LINEAR)
    return x


def noise(rows: int, like: Tensor, sigma: float = SIGMA, seed: int = 0) -> Tensor:
    """(rows, d) Gaussian, ``sigma`` times as large as ``like``."""
    scale = sigma * like.square().mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, like.shape[1], generator=generator)


def sent(noisy: Traffic) -> Tensor:
    """(T, d): the first layer's input, with noise."""
    x, _ = joined(noisy.forward, noisy.weight("0.self_attn.q_proj"), op=Op.LINEAR)
    return x


# The mode


def test_the_mode_with_one_vector_hides_no_token(record: Record, first_inputs: Tensor) -> None:
    noisy = record(privacy=Privacy(mode="noise", pool=1), windows=1)
    found = attacks.unmask_fixed(sent(noisy), first_inputs)
    assert attacks.share(found, noisy.ids.flatten()) == 1.0


def test_the_mode_with_a_pool_hides_no_token(record: Record, first_inputs: Tensor) -> None:
    noisy = record(privacy=Privacy(mode="noise", pool=64))
    found = attacks.unmask_pooled(sent(noisy), 64, first_inputs)
    assert attacks.share(found, noisy.ids.flatten()) == 1.0


def test_the_mode_with_fresh_noise_stands_the_simplest_attack(
    record: Record, first_inputs: Tensor
) -> None:
    """And no more is said of it."""
    noisy = record(privacy="noise", windows=2)
    found = attacks.nearest(sent(noisy), first_inputs)
    assert attacks.at_chance(found, noisy.ids.flatten(), VOCABULARY)


# The scheme


def test_one_vector_for_a_layer_hides_no_token(
    plain: Traffic, first: Tensor, first_inputs: Tensor
) -> None:
    observed = first + noise(1, first)
    assert attacks.share(attacks.nearest(observed, first_inputs), plain.ids.flatten()) < 0.05
    found = attacks.unmask_fixed(observed, first_inputs)
    assert attacks.share(found, plain.ids.flatten()) == 1.0


@pytest.mark.parametrize("pool", [8, 64, 128])
def test_a_pool_of_vectors_hides_no_token(
    plain: Traffic, first: Tensor, first_inputs: Tensor, pool: int
) -> None:
    """Each row takes one of the pool, the pool is smaller than the width."""
    drawn = torch.randint(pool, (len(first),), generator=torch.Generator().manual_seed(1))
    observed = first + noise(pool, first)[drawn]
    found = attacks.unmask_pooled(observed, pool, first_inputs)
    assert attacks.share(found, plain.ids.flatten()) == 1.0


def test_mixtures_of_a_pool_hide_no_token(
    plain: Traffic, first: Tensor, first_inputs: Tensor
) -> None:
    mix = torch.randn(len(first), 128, generator=torch.Generator().manual_seed(1))
    observed = first + mix @ noise(128, first)
    found = attacks.unmask_pooled(observed, 128, first_inputs)
    assert attacks.share(found, plain.ids.flatten()) == 1.0


def test_an_executor_that_answers_for_the_noise_knows_it(
    plain: Traffic, first: Tensor, first_inputs: Tensor
) -> None:
    """The scheme's W n has to come from somewhere; whoever is asked for it was told n."""
    fresh = noise(len(first), first)
    observed, asked_for = first + fresh, fresh
    found = attacks.nearest(observed - asked_for, first_inputs)
    assert attacks.share(found, plain.ids.flatten()) == 1.0


def test_fresh_noise_on_the_same_prompt_averages_away(first: Tensor, first_inputs: Tensor) -> None:
    """Noise of ten times the activation, what 16-bit numbers can bear: 100 repetitions of a
    prompt are enough. (A thousand times takes a million.)"""
    prompt = first[:64]
    total = torch.zeros_like(prompt)
    for seed in range(100):
        total += prompt + noise(64, prompt, sigma=10.0, seed=seed)
    truth = attacks.nearest(prompt, first_inputs)
    assert attacks.share(attacks.nearest(total / 100, first_inputs), truth) == 1.0
