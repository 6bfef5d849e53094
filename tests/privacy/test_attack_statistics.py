"""The yardsticks of the attacks: what they let pass and what they notice."""

from __future__ import annotations

import attacks
import pytest
import torch

COUNT = 3_000


def drawn(most: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(most, (count,), generator=torch.Generator().manual_seed(seed))


def test_uniform_bytes_pass() -> None:
    counts = torch.bincount(drawn(256, 20_000_000), minlength=256)
    assert attacks.uniformity(counts) > 1e-2


def test_a_rare_bias_is_noticed() -> None:
    """Bytes of which one in 300 has its highest bit cleared."""
    values, spoilt = drawn(256, 20_000_000), drawn(300, 20_000_000, seed=1) == 0
    counts = torch.bincount(torch.where(spoilt, values & 127, values), minlength=256)
    assert attacks.uniformity(counts) < 1e-4


def test_counts_without_spread_are_uniform() -> None:
    assert attacks.uniformity(torch.full((256,), 1000)) == pytest.approx(1.0)


def test_blind_guesses_are_at_chance() -> None:
    assert attacks.at_chance(drawn(50, COUNT), drawn(50, COUNT, seed=1), 50)


def test_constant_guesses_are_at_chance_however_often_right() -> None:
    """Nine of ten tokens are the same, and who always guesses that knows nothing."""
    truth = torch.where(drawn(10, COUNT) == 0, drawn(50, COUNT, seed=1), 7)
    assert attacks.at_chance(torch.full((COUNT,), 7), truth, 50)


@pytest.mark.parametrize("vocabulary", [50, 4096])
def test_a_twentieth_of_knowledge_is_noticed(vocabulary: int) -> None:
    truth, blind = drawn(vocabulary, COUNT), drawn(vocabulary, COUNT, seed=1)
    known = drawn(20, COUNT, seed=2) == 0
    assert not attacks.at_chance(torch.where(known, truth, blind), truth, vocabulary)


def test_of_few_tokens_most_must_be_right() -> None:
    """Sixteen that differ: who knows nothing but which they are has one right."""
    truth, guesses = torch.arange(16), torch.arange(16).roll(1)
    guesses[:8] = truth[:8]
    assert attacks.at_chance(guesses, truth, 4096)
    assert not attacks.at_chance(truth, truth, 4096)
