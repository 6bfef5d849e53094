"""The route over int8 products gives the bytes of the one over fp64, which test_ring.py compares
with Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from symbiosis.privacy import digits
from symbiosis.privacy.ring import by_digits, by_float64, ring_product

WEIGHTS = {8: torch.int8, 16: torch.int16}
RESIDUES = {8: torch.int32, 16: torch.int64}
bits_of = st.sampled_from([8, 16])
sizes = st.one_of(st.integers(0, 9), st.sampled_from([31, 64, 65, 257]))


def drawn(shape: tuple[int, int], least: int, most: int, seed: int, extremes: bool) -> Tensor:
    """Uniform in [least, most], or the two ends only."""
    generator = torch.Generator().manual_seed(seed)
    if extremes:
        coins = torch.randint(0, 2, shape, generator=generator, dtype=torch.bool)
        return torch.where(coins, least, most)
    return torch.randint(least, most, shape, generator=generator)


def residues(shape: tuple[int, int], bits: int, seed: int = 0, extremes: bool = False) -> Tensor:
    half = 1 << (31 if bits == 8 else 47)
    return drawn(shape, -half, half - 1, seed, extremes).to(RESIDUES[bits])


def numbers(shape: tuple[int, int], bits: int, seed: int = 0, extremes: bool = False) -> Tensor:
    """All of the dtype's values, the least too, which no weight has."""
    half = 1 << (bits - 1)
    return drawn(shape, -half, half - 1, seed, extremes).to(WEIGHTS[bits])


def same(w: Tensor, u: Tensor) -> bool:
    """Whether both routes give the same bytes in the same shape."""
    return torch.equal(by_digits(w, u), by_float64(w, u))


def test_this_machine_multiplies_bytes_exactly() -> None:
    """Where this fails, products go through fp64 and the tests below say nothing."""
    assert digits.exact()


@example((1, 1, 2), 8, 0, False, False, False)  # one column: its strides say nothing
@example((3, 2, 1), 16, 0, True, True, True)
@given(st.tuples(sizes, sizes, sizes), bits_of, st.integers(0, 2**31), *[st.booleans()] * 3)
def test_both_routes_give_the_same_bytes(
    shape: tuple[int, int, int], bits: int, seed: int, extremes: bool, turned: bool, strided: bool
) -> None:
    t, i, o = shape
    w = numbers((i, o), bits, seed, extremes).t() if turned else numbers((o, i), bits, seed)
    u = residues((t, i), bits, seed + 1, extremes)
    if strided:
        u = torch.stack([u, u], 2)[..., 1]
    assert same(w, u)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("u", ["least", "most", "carries"])
def test_the_largest_sums(bits: int, u: str) -> None:
    """All numbers alike, as wide as the route may go: the sums that could leave int32."""
    width = digits.MAX_WIDTH[WEIGHTS[bits]]
    half = 1 << (31 if bits == 8 else 47)
    value = {"least": -half, "most": half - 1, "carries": -0x7F7F7F80}[u]
    x = torch.full((1, width), value, dtype=RESIDUES[bits])
    for extreme in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
        w = torch.full((2, width), extreme, dtype=WEIGHTS[bits])
        assert same(w, x)
        assert same(w.t().contiguous().t(), x)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rows", [1, 2, 300, 600])
@pytest.mark.parametrize("turned", [False, True])
def test_few_and_many_rows(bits: int, rows: int, turned: bool) -> None:
    """The digits of few rows are found in another way than those of many."""
    w = numbers((257, 130), bits).t() if turned else numbers((130, 257), bits)
    assert same(w, residues((rows, 257), bits))


@pytest.mark.parametrize("bits", [8, 16])
def test_the_input_is_left_as_it_is(bits: int) -> None:
    u, w = residues((300, 257), bits), numbers((4, 257), bits)
    before = u.clone(), w.clone()
    by_digits(w, u)
    assert torch.equal(u, before[0]) and torch.equal(w, before[1])


@pytest.mark.parametrize("bits", [8, 16])
def test_wider_inputs_than_the_route_may_take(bits: int) -> None:
    width = digits.MAX_WIDTH[WEIGHTS[bits]] + 1
    w, u = numbers((2, width), bits, extremes=True), residues((1, width), bits, 1, extremes=True)
    assert torch.equal(ring_product(w, u), by_float64(w, u))
