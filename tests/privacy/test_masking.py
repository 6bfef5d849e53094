"""Masks and fixed point by themselves, and masked products against integers without a mask."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from exchanges import exchange, weight_id
from symbiosis import Executor, Privacy, Session, connect
from symbiosis.client import masking
from symbiosis.client.masking import MaskProducts
from symbiosis.client.own_weights import OwnWeights
from symbiosis.errors import ConnectionLost
from symbiosis.executor import batch, ops
from symbiosis.executor import ring as executor_ring
from symbiosis.executor.weights import Weights
from symbiosis.privacy import ring
from symbiosis.privacy.fixed import from_fixed, to_fixed
from symbiosis.privacy.masks import MaskName, MaskStream, expand
from symbiosis.privacy.pool import Mask, MaskPool, Site
from symbiosis.privacy.ring import LIMIT, quantise, ring_product, to_wire
from symbiosis.wire.exchange import NO_BIAS, Op

KEY = bytes(range(32))
bits_of = st.sampled_from([8, 16])

# Masks


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 100_003)])
def test_a_mask_is_the_stream_of_its_name(bits: int, shape: tuple[int, int]) -> None:
    """AES of the number and a counter, block by block; computed here in another mode of AES."""
    number = 2**63 + 5
    found = to_wire(expand(MaskName(KEY, number), *shape, bits))
    wanted = shape[0] * shape[1] * (4 if bits == 8 else 6)
    blocks = [
        number.to_bytes(8, "big") + block.to_bytes(8, "big") for block in range(-(-wanted // 16))
    ]
    cipher = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    assert (
        found.contiguous().view(torch.uint8).numpy().tobytes()
        == cipher.update(b"".join(blocks))[:wanted]
    )


@given(bits_of, st.integers(1, 9), st.integers(1, 9), st.data())
def test_rows_of_a_mask_are_those_of_the_whole(
    bits: int, rows: int, width: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    whole = expand(MaskName(KEY, 7), rows, width, bits)
    found = expand(MaskName(KEY, 7), stop - start, width, bits, start)
    assert torch.equal(found, whole[start:stop])


def test_other_names_are_other_masks() -> None:
    names = [MaskName(KEY, 0), MaskName(KEY, 1), MaskName(KEY[::-1], 0)]
    masks = [expand(name, 4, 16, 8) for name in names]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            assert (mask != other).float().mean() > 0.9


def test_a_stream_never_repeats_a_name() -> None:
    stream, taken = MaskStream(), []

    def take() -> None:
        taken.extend([stream.next() for _ in range(2000)])

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 8000
    assert MaskStream().next().key != stream.next().key


# Fixed point


def _rows(seed: int, rows: int, width: int, outlier: float, exponent: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x[:, 0] *= outlier
    return x * 10.0**exponent


@settings(max_examples=400)
@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 300),
    bits_of,
    st.sampled_from([1.0, 0.0, 1e3, 1e8]),
    st.integers(-30, 30),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_no_product_can_wrap_around(
    seed: int, rows: int, width: int, bits: int, outlier: float, exponent: int, dtype: torch.dtype
) -> None:
    """The worst weight for a row is the row itself, as large as its numbers may be."""
    x = _rows(seed, rows, width, outlier, exponent).to(dtype)
    most = 127 if bits == 8 else 32767
    largest = x.double().abs().amax(1, keepdim=True).clamp_min(1e-300)
    along = (x.double() / largest * most).round().to(torch.int64)  # as a weight's rows
    signs = torch.where(x.double() < 0, -most, most).to(torch.int64)
    w = torch.cat([along, signs, -signs])
    norm = float(w.double().norm(dim=1).max())
    fixed = to_fixed(x, norm, bits)
    for row in fixed.residues.tolist():
        for out in w.tolist():
            assert abs(sum(a * b for a, b in zip(row, out, strict=True))) <= LIMIT[bits]


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_cannot_wrap_around_either(bits: int) -> None:
    """All numbers of a row round up together, and the weight has the row's own direction."""
    most = 127 if bits == 8 else 32767
    for width in range(1, 400):
        fixed = to_fixed(torch.ones(1, width), most * width**0.5, bits)
        reached = most * sum(fixed.residues[0].tolist())
        assert 0.99 * LIMIT[bits] < reached <= LIMIT[bits]


@given(st.integers(0, 2**31), st.integers(1, 200), bits_of, st.integers(-30, 30))
def test_fixed_point_uses_the_room_there_is(
    seed: int, width: int, bits: int, exponent: int
) -> None:
    """Each number is right to half a step, and the steps are as small as the ring allows."""
    x = _rows(seed, 3, width, 1.0, exponent)
    norm = (127.0 if bits == 8 else 32767.0) * width**0.5
    fixed = to_fixed(x, norm, bits)
    assert ((fixed.residues * fixed.steps - x).abs() <= fixed.steps * 0.5000001).all()
    reached = fixed.residues.double().norm(dim=1) * norm
    assert (reached > 0.99 * LIMIT[bits]).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("value", "finite"), [(0.0, True), (1e-45, True), (3e38, True), (float("inf"), False),
                          (float("nan"), False), (-float("inf"), False)],
)  # fmt: skip
def test_extreme_numbers(bits: int, value: float, finite: bool) -> None:
    x = torch.tensor([[value, 0.0], [1.0, -2.0]])
    fixed = to_fixed(x, 100.0, bits)
    restored = fixed.residues * fixed.steps
    if finite:
        torch.testing.assert_close(restored, x.double(), rtol=1e-4, atol=0)
    else:
        assert restored[0].isnan().all()  # and not a number that looks right
    torch.testing.assert_close(restored[1], x[1].double(), rtol=1e-4, atol=0)


# The pool


def site(rows: int = 2, weight: int = 1) -> Site:
    return Site(Op.RING_LINEAR, (weight,), rows, 3, 5, 8)


def of_numbers(site: Site, mask: Mask) -> tuple[Tensor, ...]:
    return (mask.numbers.sum(1, dtype=torch.int64),)


def test_a_mask_is_prepared_for_the_next_use() -> None:
    pool = MaskPool(of_numbers, 1 << 20)
    masks = []
    for _ in range(5):
        masks.append(pool.take(site()))
        waiting = pool._waiting[site()]
        waiting.products()  # complete now
    assert len({mask.name for mask in masks}) == 5
    assert pool.use.used == 5
    assert pool.use.prepared == 4
    for mask in masks:
        assert torch.equal(mask.products()[0], mask.numbers.sum(1, dtype=torch.int64))
    pool.close()
    assert pool.use.dropped == 1


def take_all(pool: MaskPool, sites: range, rounds: int) -> int:
    """Each site in turn; how many masks were prepared, if each had the time to be."""
    before = pool.use.prepared
    for _ in range(rounds):
        for weight in sites:
            pool.take(site(weight=weight)).products()
            for waiting in pool._waiting.values():
                waiting.products()
            assert sum(each.num_bytes for each in pool._waiting) <= pool._ahead_bytes
    return pool.use.prepared - before


@pytest.mark.parametrize("room", [0, 1, 4, 9, 10, 11])
def test_a_pool_that_is_too_small_prepares_what_it_has_room_for(room: int) -> None:
    pool = MaskPool(of_numbers, room * site().num_bytes)
    assert take_all(pool, range(10), 6) == 5 * min(room, 10)
    assert pool.use.dropped == 0  # and computes none in vain
    pool.close()


def test_what_is_not_used_any_more_makes_room() -> None:
    """After a prompt's sites come those of its tokens."""
    pool = MaskPool(of_numbers, 10 * site().num_bytes)
    take_all(pool, range(10), 2)
    assert take_all(pool, range(20, 30), 4) == 9 + 10  # from the third round on
    assert pool.use.dropped == 10
    assert take_all(pool, range(20, 30), 2) == 20
    pool.close()


def test_sites_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symbiosis.privacy.pool._MOST_SITES", 5)
    pool = MaskPool(of_numbers, 3 * site().num_bytes)
    take_all(pool, range(100), 1)
    assert len(pool._taken) == 5
    take_all(pool, range(4), 3)
    assert take_all(pool, range(4), 1) == 3
    pool.close()


def test_a_failure_ahead_is_nobody_elses() -> None:
    """A helper was away while masks were prepared; when they are needed, it is back."""
    away = False

    def compute(site: Site, mask: Mask) -> tuple[Tensor, ...]:
        if away:
            raise ConnectionLost("the helper has gone")
        return of_numbers(site, mask)

    pool = MaskPool(compute, 1 << 20)
    away = True
    for weight in range(3):
        with pytest.raises(ConnectionLost):
            pool.take(site(weight=weight)).products()
        with pytest.raises(ConnectionLost):
            pool._waiting[site(weight=weight)].products()
    away = False
    for weight in range(3):
        mask = pool.take(site(weight=weight))
        assert torch.equal(mask.products()[0], of_numbers(mask.site, mask)[0])
    assert (pool.use.used, pool.use.prepared, pool.use.dropped) == (6, 0, 3)
    pool.close()


def test_without_bytes_nothing_is_prepared() -> None:
    pool = MaskPool(of_numbers, 0)
    for _ in range(3):
        mask = pool.take(site())
        assert torch.equal(mask.products()[0], mask.numbers.sum(1, dtype=torch.int64))
    assert pool.use.prepared == 0
    pool.close()


def test_a_failure_is_told_to_whoever_waits() -> None:
    def fail(site: Site, mask: Mask) -> tuple[Tensor, ...]:
        raise ConnectionLost("the helper has gone")

    pool = MaskPool(fail, 1 << 20)
    for _ in range(3):
        with pytest.raises(ConnectionLost, match="helper has gone"):
            pool.take(site()).products()
    pool.close()


def test_a_closed_pool_leaves_nobody_waiting() -> None:
    held, release = threading.Event(), threading.Event()

    def slow(site: Site, mask: Mask) -> tuple[Tensor, ...]:
        held.set()
        assert release.wait(60)
        return ()

    pool = MaskPool(slow, 0)
    first = pool.take(site())
    assert held.wait(60)
    second = pool.take(site())
    pool._stop()
    with pytest.raises(ConnectionLost, match="closed"):
        second.products()
    with pytest.raises(ConnectionLost, match="closed"):
        first.products()  # which a helper may never complete
    third = pool.take(site())
    with pytest.raises(ConnectionLost, match="closed"):
        third.products()
    release.set()


def test_what_is_not_wanted_any_more_is_not_computed_on(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    source = MaskProducts({}, OwnWeights(None), 8)
    source._kept[1] = quantise(torch.ones(5, 3), 0, 8)
    mask = Mask(MaskStream().next(), site(rows=9))
    blocks: list[int] = []

    def product(w: Tensor, u: Tensor) -> Tensor:
        blocks.append(len(u))
        mask.give_up(ConnectionLost("closed"))
        return ring_product(w, u)

    monkeypatch.setattr(masking, "ring_product", product)
    monkeypatch.setattr(ring, "_BLOCK_RESIDUES", 2 * 5)
    with pytest.raises(ConnectionLost):
        source.compute(mask.site, mask)
    assert blocks == [2]


AT_WORK = """
import threading, torch
torch.set_num_threads(1)
from symbiosis.client.masking import MaskProducts
from symbiosis.client.own_weights import OwnWeights
from symbiosis.privacy.pool import MaskPool, Site
from symbiosis.privacy.ring import quantise
from symbiosis.wire.exchange import Op

source = MaskProducts({}, OwnWeights(None), 8)
source._kept[1] = quantise(torch.ones(2048, 2048), 0, 8)
second = threading.Semaphore(0)

def compute(site, mask):
    second.release()
    return source.compute(site, mask)

pool = MaskPool(compute, 1 << 40)
pool.take(Site(Op.RING_LINEAR, (1,), 4, 2048, 2048, 8)).products()
pool.take(Site(Op.RING_LINEAR, (1,), 30_000, 2048, 2048, 8))
for _ in range(3):  # the third is the large one
    second.acquire()
print("done", flush=True)
"""


def test_a_process_that_ends_while_masks_are_multiplied() -> None:
    """Without close(): a thread within torch would abort it, with a core and exit code -6."""
    ended = subprocess.run(
        [sys.executable, "-c", AT_WORK], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


# Through a real executor


class Parts(nn.Module):
    """Matrices of both kinds, among them outliers, zeros and a single row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(37, 23, bias=False)
        self.conv1d = Conv1D(11, 37)
        self.one = nn.Linear(37, 1, bias=False)
        with torch.no_grad():
            self.linear.weight[:, 3] *= 1e3
            self.linear.weight[5] = 0
            self.linear.weight[6] *= 1e-20
            self.conv1d.weight[:, 2] *= 1e4


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def masked_base(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    folder = tmp_path_factory.mktemp("parts")
    weights = Weights(parts, "parts", Path(folder))  # type: ignore[arg-type]
    with Executor(weights, masked=(8, 16)) as executor:
        executor.listen([f"unix://{folder}/base.sock"])
        yield executor


@pytest.fixture(scope="module", params=[8, 16])
def masked(
    request: pytest.FixtureRequest, masked_base: Executor
) -> Iterator[tuple[Session, Executor, int]]:
    assert masked_base._server is not None
    url = str(masked_base._server.addresses[0])
    with connect(url, privacy=Privacy(mode="masked-local", bits=request.param)) as session:
        yield session, masked_base, request.param


def without_mask(matrix: Tensor, axis: int, op: Op, x: Tensor, norm: float, bits: int) -> Tensor:
    """The same integers multiplied as Python's, and no mask anywhere."""
    w = quantise(matrix, axis, bits)
    into = axis == (1 if op is Op.LINEAR else 0)  # the scales go into the input
    fixed = to_fixed(x.double() * w.scales if into else x, norm, bits)
    numbers = (w.numbers if op is Op.LINEAR else w.numbers.t()).tolist()
    exact = [
        [sum(a * b for a, b in zip(row, out, strict=True)) for out in numbers]
        for row in fixed.residues.tolist()
    ]
    y = from_fixed(torch.tensor(exact, dtype=torch.int64), fixed.steps)
    return (y if into else y * w.scales).to(x.dtype)


NAMES = {"linear": 0, "conv1d": 1, "one": 0}


def norm_of(parts: Parts, op: Op, width: int, bits: int) -> float:
    """The largest over all weights that take so many inputs."""
    made = [quantise(getattr(parts, name).weight, axis, bits) for name, axis in NAMES.items()]
    dim = 1 if op is Op.LINEAR else 0
    return max(w.norms[1 - dim] for w in made if w.numbers.shape[dim] == width)


@settings(max_examples=40)
@given(
    st.sampled_from(list(NAMES)),
    st.sampled_from([Op.LINEAR, Op.MATMUL]),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1.0, 1e5]),
    st.integers(-20, 20),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@example("linear", Op.LINEAR, 2, 0, 1.0, 37, torch.float32)
@example("linear", Op.MATMUL, 2, 0, 1.0, -37, torch.float32)
def test_masked_is_unmasked_bit_for_bit(
    masked: tuple[Session, Executor, int],
    parts: Parts,
    name: str,
    op: Op,
    rows: int,
    seed: int,
    outlier: float,
    exponent: int,
    dtype: torch.dtype,
) -> None:
    session, executor, bits = masked
    matrix = getattr(parts, name).weight.detach()
    width = matrix.shape[1 if op is Op.LINEAR else 0]
    x = _rows(seed, rows, width, outlier, exponent).to(dtype)
    number = weight_id(executor, f"{name}.weight")
    found = session.product(op, x, number, (), NO_BIAS, forward=seed % 2 == 0)
    wanted = without_mask(matrix, NAMES[name], op, x, norm_of(parts, op, width, bits), bits)
    assert torch.equal(found, wanted)


def test_a_product_is_near_the_float_product(
    masked: tuple[Session, Executor, int], parts: Parts
) -> None:
    session, executor, bits = masked
    x = torch.randn(50, 37, generator=torch.Generator().manual_seed(0))
    y = session.product(
        Op.LINEAR, x, weight_id(executor, "linear.weight"), (), NO_BIAS, forward=True
    )
    wanted = x @ parts.linear.weight.detach().t()
    error = float((y - wanted).norm() / wanted.norm())
    assert error < (0.02 if bits == 8 else 1e-4)


def test_what_is_not_finite_comes_back_as_such(masked: tuple[Session, Executor, int]) -> None:
    session, executor, _ = masked
    x = torch.ones(3, 37)
    x[1, 4] = float("inf")
    y = session.product(
        Op.LINEAR, x, weight_id(executor, "linear.weight"), (), NO_BIAS, forward=True
    )
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_no_rows_need_no_exchange(masked: tuple[Session, Executor, int]) -> None:
    session, executor, _ = masked
    before = session.stats().exchanges
    y = session.product(
        Op.LINEAR,
        torch.ones(2, 0, 37),
        weight_id(executor, "one.weight"),
        (),
        NO_BIAS,
        forward=True,
    )
    assert y.shape == (2, 0, 1)
    assert session.stats().exchanges == before


def test_rows_of_several_clients_are_computed_together(masked_base: Executor) -> None:
    """In one batch, and in pieces: the residues are those of each by itself."""
    weights = masked_base.weights
    number = weight_id(weights, "linear.weight")
    for bits in (8, 16):
        inputs = [to_wire(expand(MaskName(KEY, n), 3 + n, 37, bits)) for n in range(3)]
        asked = [exchange(Op.RING_LINEAR, number, u) for u in inputs]
        alone = [batch.compute([one], weights)[0][0] for one in asked]
        for found, wanted in zip(batch.compute(asked, weights), alone, strict=True):
            assert torch.equal(found[0], wanted)
        pieces = batch.Pieces(asked[2], 5)
        for start, stop in ((0, 2), (2, 5)):
            pieces.add(start, batch.compute([pieces.exchange(start, stop)], weights)[0])
        assert torch.equal(pieces.results()[0], alone[2])


@pytest.mark.parametrize("bits", [8, 16])
def test_many_rows_are_computed_in_blocks(
    masked_base: Executor, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """With the same bytes, and what lies between input and result does not grow with the rows."""
    weights = masked_base.weights
    numbers = (weight_id(weights, "linear.weight"), weight_id(weights, "one.weight"))
    key = torch.frombuffer(bytearray(KEY), dtype=torch.uint8)
    residues = to_wire(expand(MaskName(KEY, 9), 20, 37, bits))
    asked = [
        exchange(Op.RING_LINEAR, numbers, residues),
        exchange(Op.RING_MASK, numbers, key, params=(int(Op.RING_LINEAR), bits, 20, 9)),
    ]
    whole = [ops.run(each, weights, each.tensors) for each in asked]
    blocks: list[int] = []

    def product(w: Tensor, u: Tensor) -> Tensor:
        blocks.append(len(u))
        return ring_product(w, u)

    monkeypatch.setattr(executor_ring, "ring_product", product)
    monkeypatch.setattr(ring, "_BLOCK_RESIDUES", 3 * 37)
    for each, wanted in zip(asked, whole, strict=True):
        found = ops.run(each, weights, each.tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert set(blocks) == {2, 3}


def test_a_helper_answers_with_the_products_of_the_mask(masked_base: Executor) -> None:
    weights = masked_base.weights
    number = weight_id(weights, "linear.weight")
    matrix = weights[number].tensor
    key = torch.frombuffer(bytearray(KEY), dtype=torch.uint8)
    for bits in (8, 16):
        asked = exchange(Op.RING_MASK, number, key, params=(int(Op.RING_LINEAR), bits, 4, 9))
        plan = ops.check(asked, weights)
        assert plan.result_bytes == 4 * (37 + 23) * (4 if bits == 8 else 6)
        assert not plan.joinable
        (found,) = ops.run(asked, weights, (key,))
        n = expand(MaskName(KEY, 9), 4, 37, bits)
        assert torch.equal(found, to_wire(ring_product(quantise(matrix, 0, bits).numbers, n)))
