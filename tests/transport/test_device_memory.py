"""Memory of a device that several processes see, with the CPU as the device."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from symbiosis.errors import ProtocolError
from symbiosis.transport import device_memory
from symbiosis.transport.lent import Lender, Lent

CPU = torch.device("cpu")

GPU: dict[str, object] = {
    "gpu": "GPU-0",
    "handle": "AAAA",
    "bytes": 8,
    "offset": 0,
    "counter": ["L3RvcmNoXzFfMl8z", 0],  # /torch_1_2_3
    "event": None,
}


def lender_of(*tensors: torch.Tensor) -> Lender:
    """A block with ``tensors`` as the weights 1, 2, ..."""
    lender = Lender(1 << 16, device_memory.allocate(1 << 16, CPU))
    for number, tensor in enumerate(tensors, 1):
        lender.place(number, tensor)
    lender.seal()
    return lender


def test_a_block_is_to_itself() -> None:
    block = device_memory.allocate(1, CPU)
    assert block.dtype == torch.uint8
    assert len(block) % (2 << 20) == 0
    assert len(block) >= 10 << 20


@pytest.mark.parametrize("others", ["", "max_split_size_mb:128,expandable_segments:True"])
@pytest.mark.parametrize("expandable", [True, False])
def test_a_gpu_s_block_is_no_part_of_a_larger_one(
    others: str, expandable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: by what torch's allocator is told."""
    told: list[str] = []
    settings = {"expandable_segments": expandable, "PYTORCH_CUDA_ALLOC_CONF": others}
    snapshot = {"allocator_settings": settings}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty"))
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: told.append("block"))
    device_memory.allocate(1, torch.device("cuda"))
    but = f"{others}," if others else ""
    before, after = ([f"{but}expandable_segments:{x}"] for x in (False, True))
    assert told == ["empty", *(before * expandable), "block", *(after * expandable)]


def test_another_process_sees_the_same_bytes() -> None:
    block = device_memory.allocate(1, CPU)
    shared = device_memory.share(block)
    code = (
        "import torch; from symbiosis.transport import device_memory\n"
        f"theirs = device_memory.attach({shared!r}, torch.device('cpu'))\n"
        "theirs[7] = theirs[3] + 1"
    )
    block[3] = 41
    subprocess.run([sys.executable, "-c", code], check=True)
    assert int(block[7]) == 42


def test_weights_in_a_block_are_lent() -> None:
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.randn(4, 6).t()]
    lender = lender_of(*tensors)
    lent = Lent(os.dup(lender.descriptor), lender.table())
    assert not lent.is_in_host_memory
    assert not lender.is_sealed
    for number, tensor in enumerate(tensors, 1):
        found = lent.tensor(number, tuple(tensor.shape), CPU)
        assert found.is_contiguous()
        assert found.storage_offset() * found.itemsize % device_memory.ALIGNMENT == 0
        assert torch.equal(found, tensor)
    lender.announce(3)
    assert lent.clients == 3
    del lender
    assert torch.equal(lent.tensor(1, (3, 5), CPU), tensors[0])


def test_a_weight_beyond_the_block() -> None:
    lender = lender_of(torch.ones(8))
    weights = {"1": [(10 << 20) - 64, "float32"]}
    lent = Lent(os.dup(lender.descriptor), {**lender.table(), "weights": weights})
    with pytest.raises(ProtocolError, match="not within the 10485760 bytes"):
        lent.tensor(1, (17,), CPU)


def test_where_it_lies() -> None:
    here = device_memory.share(device_memory.allocate(1, CPU))
    assert device_memory.is_on(here, CPU)
    assert not device_memory.is_on(GPU, CPU)
    assert not device_memory.is_on({}, CPU)
    assert not device_memory.is_on({**GPU, "gpu": None}, torch.device("meta"))


@pytest.mark.parametrize(
    "wrong", [{"name": 7}, {"name": "no base64!"}, {"bytes": -1}, {"bytes": "8"}, {"manager": None}]
)
def test_what_makes_no_sense(wrong: dict[str, object]) -> None:
    shared = device_memory.share(device_memory.allocate(1, CPU))
    with pytest.raises(ProtocolError, match="makes no sense"):
        device_memory.attach({**shared, **wrong}, CPU)
    with pytest.raises(ProtocolError, match="makes no sense"):
        device_memory.attach({}, CPU)


@pytest.mark.parametrize(
    "wrong",
    [
        {"counter": ["L2V0Yy9wYXNzd2Q=", 0]},  # /etc/passwd
        {"counter": ["L3RvcmNoXzFfMl8zLy4uL3g=", 0]},  # /torch_1_2_3/../x
        {"counter": ["L3RvcmNoXzFfMl8z", -1]},
        {"counter": ["L3RvcmNoXzFfMl8z", 10_000]},
        {"counter": None},
        {"offset": -8},
        {"handle": None},
        {"event": 5},
    ],
)
def test_a_gpu_s_memory_that_makes_no_sense(
    wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before torch hears of it."""
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(ProtocolError, match="makes no sense"):
        device_memory.attach({**GPU, **wrong}, torch.device("cuda", 0))


def test_memory_that_has_gone() -> None:
    shared = device_memory.share(device_memory.allocate(1, CPU))
    with pytest.raises(RuntimeError):
        device_memory.attach(shared, CPU)
