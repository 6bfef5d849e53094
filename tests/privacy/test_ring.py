"""The ring product against Python's own integers: exact for every shape and every extreme."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.privacy.ring import (
    LIMIT,
    RingWeight,
    centred,
    from_wire,
    quantise,
    ring_product,
    to_wire,
)

MODULUS = {8: 1 << 32, 16: 1 << 48}
LARGEST = {8: 127, 16: 32767}
bits_of = st.sampled_from([8, 16])
shapes = st.tuples(*[st.integers(0, 9)] * 3)


def residues(shape: tuple[int, ...], bits: int, seed: int, extreme: bool) -> torch.Tensor:
    """Uniform residues; or only the largest and the smallest."""
    half = MODULUS[bits] // 2
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-half, half, shape, generator=generator, dtype=torch.int64)
    if extreme:
        u = torch.where(u < 0, -half, half - 1)
    return u.to(torch.int32) if bits == 8 else u


def numbers(shape: tuple[int, ...], bits: int, seed: int, extreme: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    most = LARGEST[bits]
    w = torch.randint(-most, most + 1, shape, generator=generator)
    if extreme:
        w = torch.where(w < 0, -most, most)
    return w.to(torch.int8 if bits == 8 else torch.int16)


def by_python(w: torch.Tensor, u: torch.Tensor, bits: int) -> list[list[int]]:
    """Integers of any size, reduced to the signed representatives."""
    modulus = MODULUS[bits]
    rows = [
        [sum(a * b for a, b in zip(row, out, strict=True)) for out in w.tolist()]
        for row in u.tolist()
    ]
    return [[(v + modulus // 2) % modulus - modulus // 2 for v in row] for row in rows]


@given(shapes, bits_of, st.integers(0, 2**31), st.booleans(), st.booleans())
def test_the_product_is_exact(
    shape: tuple[int, int, int], bits: int, seed: int, extreme: bool, transposed: bool
) -> None:
    t, i, o = shape
    u = residues((t, i), bits, seed, extreme)
    if transposed:
        w = numbers((i, o), bits, seed + 1, extreme).t()
    else:
        w = numbers((o, i), bits, seed + 1, extreme)
    y = ring_product(w, u)
    assert y.shape == (t, o)
    assert y.dtype is u.dtype
    assert y.tolist() == by_python(w, u, bits)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("width", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_003])
def test_the_widest_inputs_of_the_largest_numbers_are_exact(bits: int, width: int) -> None:
    u = residues((2, width), bits, 0, extreme=True)
    w = numbers((3, width), bits, 1, extreme=True)
    u[0], w[0] = -(MODULUS[bits] // 2), -LARGEST[bits]  # all signs alike: the largest sum
    assert ring_product(w, u).tolist() == by_python(w, u, bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_many_outputs_are_exact(bits: int) -> None:
    """More than are turned to fp64 at a time."""
    w, u = numbers((5000, 1000), bits, 0, extreme=False), residues((2, 1000), bits, 1, False)
    y = ring_product(w, u)
    some = [0, 4193, 4194, 4195, 4999]
    assert y[:, some].tolist() == by_python(w[some], u, bits)


@given(shapes, bits_of, st.integers(0, 2**31))
def test_a_mask_goes_out_as_it_came_in(shape: tuple[int, int, int], bits: int, seed: int) -> None:
    """W(x + n) - W n = W x: what masking rests upon."""
    t, i, o = shape
    x, n = residues((t, i), bits, seed, False), residues((t, i), bits, seed + 1, False)
    w = numbers((o, i), bits, seed + 2, False)
    difference = ring_product(w, _reduced(x + n)) - ring_product(w, n)
    assert torch.equal(_reduced(difference), ring_product(w, x))


@given(shapes, bits_of, st.integers(0, 2**31), st.booleans())
def test_residues_survive_the_wire(
    shape: tuple[int, int, int], bits: int, seed: int, extreme: bool
) -> None:
    u = residues(shape[:2], bits, seed, extreme)
    words = to_wire(u)
    assert words.nbytes == u.numel() * (4 if bits == 8 else 6)
    assert words.is_contiguous()
    assert torch.equal(from_wire(words), u)


def test_representatives_do_not_matter() -> None:
    u, w = residues((3, 5), 16, 0, False), numbers((4, 5), 16, 1, False)
    assert torch.equal(ring_product(w, u + (1 << 48)), ring_product(w, u))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"int8.*int64"):
        ring_product(numbers((2, 2), 8, 0, False), residues((2, 2), 16, 0, False))


# Quantised weights


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), bits_of, st.integers(0, 1), st.integers(0, 2**31))
def test_a_weight_is_within_half_a_step_of_its_integers(
    a: int, b: int, bits: int, axis: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(a, b, generator=generator) * 10.0 ** torch.randint(
        -6, 7, (), generator=generator
    )
    m[:, 0] *= 1000  # an outlier channel
    w = quantise(m, axis, bits)
    scales = w.scales.unsqueeze(1 - axis)
    assert w.scales.shape == (m.shape[axis],)
    assert ((w.numbers * scales - m).abs() <= scales * (0.5 + 1e-2)).all()
    assert w.numbers.abs().max() == LARGEST[bits]
    for dim, norm in zip((1, 0), w.norms, strict=True):
        assert norm == pytest.approx(float(w.numbers.double().norm(dim=dim).max()), rel=1e-12)


def test_rows_of_zeros_and_of_denormals() -> None:
    m = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [1.0, 2.0]])
    w = quantise(m, 0, 8)
    assert w.numbers.tolist() == [[0, 0], [0, 0], [64, 127]]
    assert torch.isfinite(w.scales).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantise(torch.tensor([[1.0, value]]), 0, 8)


def test_the_digest_sees_every_part() -> None:
    m = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    w = quantise(m, 0, 8)
    assert w.digest() == quantise(m.clone(), 0, 8).digest()
    other = w.numbers.clone()
    other[1, 2] += 1
    others: list[RingWeight] = [
        w._replace(numbers=other),
        w._replace(scales=w.scales * 2),
        w._replace(axis=1),
        quantise(m, 0, 16),
    ]
    assert len({w.digest(), *(each.digest() for each in others)}) == 5


def test_the_limits_are_those_of_the_signed_representatives() -> None:
    assert {bits: 2 * limit + 2 for bits, limit in LIMIT.items()} == MODULUS


def _reduced(u: torch.Tensor) -> torch.Tensor:
    return u if u.dtype is torch.int32 else centred(u.clone())
