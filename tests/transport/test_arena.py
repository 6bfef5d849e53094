"""Shared memory: who gets which place, when it is free again, and what an executor maps."""

from __future__ import annotations

import fcntl
import gc
import mmap
import multiprocessing
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ProtocolError
from symbiosis.transport import arena as arena_module
from symbiosis.transport.arena import (
    MAX_ARENA_BYTES,
    Arena,
    ArenaUnfit,
    FreeSpace,
    Laid,
    ResultSizes,
    attached,
    receive_with_descriptors,
)
from symbiosis.wire.places import INLINE
from symbiosis.wire.tensors import TensorSpec, spec_of

LARGE = (64, 1024)  # 256 KiB in fp32
SPEC = TensorSpec(torch.float32, LARGE)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(8 << 20)
    yield made
    made.close_descriptor()


def lay(arena: Arena, *tensors: torch.Tensor, results: int = 1) -> Laid | None:
    """With room for so many results of the input's size."""
    specs = tuple(spec_of(tensor) for tensor in tensors)
    return arena.lay_out(tensors, specs, [specs[0].num_bytes] * results)


def answered(arena: Arena, x: torch.Tensor) -> torch.Tensor:
    """The result of an exchange that doubles ``x``, as the two sides work together."""
    theirs = attached(arena.descriptor)
    laid = lay(arena, x)
    assert laid is not None
    (seen,) = theirs.inputs(laid.places, (spec_of(x),), ())
    assert torch.equal(seen, x)
    assert theirs.deliver(laid.places, (seen * 2,)) == ()
    return laid.results((spec_of(x),), ())[0]


# Free space


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=80))
def test_no_two_takers_share_a_byte_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    free = FreeSpace(100)
    taken: dict[int, int] = {}
    for take, number in steps:
        if take:
            start = free.take(number)
            if start is None:
                gaps = set(range(100)).difference(*(range(s, s + n) for s, n in taken.items()))
                assert not any(gaps.issuperset(range(s, s + number)) for s in gaps)
                continue
            assert 0 <= start <= 100 - number
            assert all(start + number <= s or s + n <= start for s, n in taken.items())
            taken[start] = number
        elif taken:
            start = sorted(taken)[number % len(taken)]
            free.give(start, taken.pop(start))
    for start, size in taken.items():
        free.give(start, size)
    assert free.take(100) == 0


# Places and the tensors in them


def test_input_and_result_cross_without_a_byte_in_the_payload(arena: Arena) -> None:
    x = torch.randn(LARGE)
    y = answered(arena, x)
    assert torch.equal(y, 2 * x)
    assert y.is_contiguous() and not y._is_view()
    assert y.untyped_storage().nbytes() == y.nbytes
    assert y.data_ptr() % mmap.PAGESIZE == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype(arena: Arena, dtype: torch.dtype) -> None:
    x = torch.randn(LARGE).to(dtype)
    assert torch.equal(answered(arena, x), 2 * x)


def test_a_place_is_never_given_again_while_a_tensor_sees_it(arena: Arena) -> None:
    """A view of the result, a tensor that autograd saved, the storage alone."""
    x = torch.randn(LARGE)
    view = answered(arena, x)[3:5]
    leaf = torch.ones(LARGE, requires_grad=True)
    product = (leaf * answered(arena, x + 1)).sum()
    storage = answered(arena, x + 2).untyped_storage()
    for number in range(20):
        answered(arena, torch.full(LARGE, float(number)))
    assert torch.equal(view, 2 * x[3:5])
    product.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, 2 * (x + 1))
    kept = torch.empty(0).set_(storage, 0, LARGE)  # type: ignore[call-overload]
    assert torch.equal(kept, 2 * (x + 2))


def test_places_are_free_when_their_tensors_die_in_any_thread(arena: Arena) -> None:
    results = [answered(arena, torch.randn(LARGE)) for _ in range(4)]
    assert arena.held_bytes == 4 * SPEC.num_bytes
    addresses = {result.data_ptr() for result in results}
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    assert arena.held_bytes == 0
    again = [answered(arena, torch.randn(LARGE)) for _ in range(3)]
    assert {result.data_ptr() for result in again} <= addresses | {min(addresses) - SPEC.num_bytes}


def test_a_full_arena_is_not_used(arena: Arena) -> None:
    kept = []
    while (laid := lay(arena, torch.randn(LARGE))) is not None:
        kept.append(laid)
    assert len(kept) == 16  # 8 MiB of inputs and results
    kept.clear()
    assert lay(arena, torch.randn(LARGE)) is not None


def test_small_and_integer_tensors_travel_in_the_payload(arena: Arena) -> None:
    assert lay(arena, torch.randn(2, 8)) is None
    offsets = torch.arange(1 << 15, dtype=torch.int32)
    laid = lay(arena, torch.randn(LARGE), offsets)
    assert laid is not None
    assert laid.places.inputs[1] == INLINE != laid.places.inputs[0]
    assert laid.inline[0] is offsets


def test_a_result_larger_than_its_room_comes_in_the_payload(arena: Arena) -> None:
    """A wrong guess costs a copy, and nothing else."""
    x = torch.randn(LARGE)
    laid = lay(arena, x, results=2)
    assert laid is not None
    larger = torch.randn(100, 1024)
    rest = attached(arena.descriptor).deliver(laid.places, (larger, x))
    assert len(rest) == 1
    specs = (spec_of(larger), spec_of(x))
    assert laid.outside(specs) == (spec_of(larger),)
    found = laid.results(specs, (larger,))
    assert torch.equal(found[0], larger) and torch.equal(found[1], x)


def test_memory_that_is_not_used_for_long_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_TRIM_EVERY", 4)
    arena = Arena(256 << 20)
    low = answered(arena, torch.randn(LARGE))
    wanted = low.clone()
    del_me = [answered(arena, torch.randn(4096, 1024)) for _ in range(7)]
    touched = os.fstat(arena.descriptor).st_blocks * 512
    assert touched > 7 * (16 << 20)
    del_me.clear()
    for _ in range(20):
        answered(arena, torch.randn(LARGE))
    assert os.fstat(arena.descriptor).st_blocks * 512 < touched / 4
    assert torch.equal(low, wanted)
    arena.close_descriptor()


def test_the_memory_goes_with_its_last_tensor() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:symbiosis")

    gc.collect()
    before, descriptors = mapped(), len(os.listdir("/proc/self/fd"))
    arena = Arena(8 << 20)
    y = answered(arena, torch.randn(LARGE))
    wanted = y.clone()
    arena.close()
    del arena
    assert mapped() == before + 1
    assert torch.equal(y, wanted)
    del y
    assert mapped() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("closed", [False, True])
def test_a_forked_childs_tensors_are_its_own(closed: bool) -> None:
    x = torch.randn(LARGE)
    arena = Arena(8 << 20)
    y = answered(arena, x)
    if closed:
        arena.close()
        del arena
    context = multiprocessing.get_context("fork")
    overwritten, checked = context.Event(), context.Queue()

    def child() -> None:
        overwritten.wait(30)
        right = bool((y == 2 * x).all())
        y.zero_()
        checked.put(right)

    process = context.Process(target=child)
    process.start()
    y.fill_(7)
    overwritten.set()
    assert checked.get(timeout=30)
    process.join(30)
    assert bool((y == 7).all())


# How large a result will be


def test_sizes_grow_with_the_input_and_are_learned_anew() -> None:
    sizes = ResultSizes()
    assert sizes.expected("up", 8) == []
    sizes.learn("up", 8, (TensorSpec(torch.float32, (4,)), TensorSpec(torch.bfloat16, (4,))))
    assert sizes.expected("up", 8) == [16, 8]
    assert sizes.expected("up", 12) == [24, 12]
    assert sizes.expected("down", 8) == []
    sizes.learn("up", 8, (SPEC,))
    assert sizes.expected("up", 8) == [SPEC.num_bytes]


# What an executor maps


def _memfd(size: int, *, seals: int = fcntl.F_SEAL_SHRINK, flags: int = 0) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _file() -> int:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        return os.dup(file.fileno())


UNFIT: dict[str, tuple[Callable[[], int], str]] = {
    "unsealed": (lambda: _memfd(4096, seals=0), "not sealed against shrinking"),
    "sealed otherwise": (lambda: _memfd(4096, seals=fcntl.F_SEAL_GROW), "not sealed"),
    "empty": (lambda: _memfd(0), "0 bytes"),
    "too large": (lambda: _memfd(MAX_ARENA_BYTES + 4096), "an arena has 1 to"),
    "a file": (_file, "not sealed against shrinking"),
    "a pipe": (lambda: os.pipe2(0)[0], "not that of a memfd"),
    "/dev/null": (lambda: os.open("/dev/null", os.O_RDWR), "not that of a memfd"),
    "huge pages": (lambda: _memfd(2 << 20, flags=os.MFD_HUGETLB), "ordinary pages"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_descriptor_that_could_harm_the_executor_is_not_mapped(case: str) -> None:
    make, told = UNFIT[case]
    try:
        descriptor = make()
    except OSError as error:
        pytest.skip(f"cannot be made here: {error}")
    with pytest.raises(ArenaUnfit, match=told):
        attached(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, getattr(fcntl, "F_SEAL_FUTURE_WRITE", 16)])
def test_memory_that_cannot_be_written_is_not_mapped(seal: int) -> None:
    descriptor = _memfd(4096, seals=fcntl.F_SEAL_SHRINK | seal)
    with pytest.raises(OSError):
        attached(descriptor)
    os.close(descriptor)


def test_several_descriptors_are_closed_and_refused() -> None:
    here, there = socket.socketpair()
    null = os.open("/dev/null", os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    with here, there:
        for count in (2, 5, 40):
            socket.send_fds(here, [b"x"], [null] * count)
            with pytest.raises(ProtocolError, match="several descriptors"):
                receive_with_descriptors(there, memoryview(bytearray(10)))
            assert len(os.listdir("/proc/self/fd")) == before
    os.close(null)
