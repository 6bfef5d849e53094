"""Memory that an executor lends: readable by whoever gets the descriptor, and no more."""

from __future__ import annotations

import fcntl
import mmap
import os

import pytest
import torch

from symbiosis.errors import ProtocolError
from symbiosis.transport.lent import Lender, Lent

CPU = torch.device("cpu")


def lent_of(*tensors: torch.Tensor) -> tuple[Lender, dict[str, object], list[torch.Tensor]]:
    """Sealed memory with ``tensors`` as the weights 1, 2, ..., its table, and where they lie."""
    lender = Lender(1 << 16)
    placed = [lender.place(number, tensor) for number, tensor in enumerate(tensors, 1)]
    lender.seal()
    return lender, lender.table(), placed


def table_of(weights: dict[str, object]) -> dict[str, object]:
    return {"weights": weights, "device": None}


def test_what_is_placed_is_what_is_lent() -> None:
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.randn(2, 3, 4).double()]
    lender, table, placed = lent_of(*tensors)
    lent = Lent(os.dup(lender.descriptor), table)
    for number, (tensor, theirs) in enumerate(zip(tensors, placed, strict=True), 1):
        found = lent.tensor(number, tuple(tensor.shape), CPU)
        assert number in lent
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert torch.equal(theirs, tensor)
        assert theirs.data_ptr() % 64 == 0
    assert 4 not in lent
    descriptor = lender.descriptor
    del lender
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert torch.equal(lent.tensor(1, (3, 5), CPU), tensors[0])


def test_nobody_can_change_it() -> None:
    lender, table, (ours,) = lent_of(torch.ones(8))
    again = os.open(f"/proc/self/fd/{lender.descriptor}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, mmap.PAGESIZE)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", mmap.PAGESIZE)
        with pytest.raises(PermissionError):
            os.ftruncate(again, 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(again)
    mine, theirs = (Lent(os.dup(lender.descriptor), table).tensor(1, (8,), CPU) for _ in range(2))
    mine.zero_()
    assert torch.equal(ours, torch.ones(8))
    assert torch.equal(theirs, torch.ones(8))


def test_who_is_at_work_is_seen_at_once() -> None:
    lender, table, _ = lent_of(torch.ones(8))
    lent = Lent(os.dup(lender.descriptor), table)
    assert lent.clients == 0
    for clients in (1, 70000, 2):
        lender.announce(clients)
        assert lent.clients == clients


@pytest.mark.parametrize(
    "table",
    [
        None,
        [1],
        {"weights": {}},
        {"weights": [1], "device": None},
        {"weights": {}, "device": "cuda"},
        *(
            {"weights": weights, "device": None}
            for weights in (
                {"1": 4096},
                {"x": [4096, "float32"]},
                {"1": ["far", "float32"]},
                {"1": [4097, "float32"]},
                {"1": [4096, "Tensor"]},
                {"1": [4096, "nothing"]},
            )
        ),
    ],
)
def test_a_table_that_makes_no_sense(table: object) -> None:
    lender, _, _ = lent_of(torch.ones(8))
    descriptor = os.dup(lender.descriptor)
    with pytest.raises(ProtocolError, match="makes no sense"):
        Lent(descriptor, table)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("start", [-64, 1 << 20, (1 << 16) + 4096 - 64])
def test_a_weight_beyond_what_is_lent(start: int) -> None:
    lender, _, _ = lent_of(torch.ones(8))
    lent = Lent(os.dup(lender.descriptor), table_of({"1": [start, "float32"]}))
    with pytest.raises(ProtocolError, match="not within"):
        lent.tensor(1, (8, 4), CPU)


def test_memory_that_could_be_taken_away() -> None:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1 << 16)
    with pytest.raises(ProtocolError, match="not sealed"):
        Lent(descriptor, table_of({}))
