"""Activations in a device's memory: its blocks and what lies where; the CPU is the device."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from symbiosis.errors import QuotaExceeded, RequestRefused
from symbiosis.transport import device_memory
from symbiosis.transport.arena import AttachedArena
from symbiosis.transport.device_arena import DeviceArena, DeviceBlocks, bytes_needed
from symbiosis.wire.places import INLINE
from symbiosis.wire.tensors import TensorSpec, spec_of

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of 512 MiB, of which an eighth is for clients."""
    monkeypatch.setattr(device_memory, "total_bytes", lambda device: 512 * MIB)


def both(num_bytes: int = MIB) -> tuple[DeviceArena, AttachedArena]:
    """A client's side and the executor's, of one block that is mapped twice."""
    block = DeviceBlocks(CPU).take(num_bytes)
    ours = device_memory.attach(block.shared, CPU)
    assert ours.data_ptr() != block.memory.data_ptr()
    return DeviceArena(ours), AttachedArena(block.memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_and_results_cross_without_a_byte_in_the_payload(dtype: torch.dtype) -> None:
    client, executor = both()
    x, z = torch.randn(3, 5).to(dtype), torch.randn(7).to(dtype)
    specs = spec_of(x), spec_of(z)
    laid = client.lay_out((x, z), specs, [spec.num_bytes for spec in specs])
    assert laid is not None and laid.inline == ()
    laid.places.check(specs, executor.size_bytes)
    seen = executor.inputs(laid.places, specs, ())
    assert torch.equal(seen[0], x) and torch.equal(seen[1], z)
    assert executor.deliver(laid.places, (2 * seen[0], 2 * seen[1])) == ()
    found = laid.results(specs, ())
    assert torch.equal(found[0], 2 * x) and torch.equal(found[1], 2 * z)


def test_results_are_copies() -> None:
    """So that the block is free for the next exchange."""
    client, executor = both()
    x = torch.randn(4, 4)
    kept = []
    for factor in range(1, 4):
        laid = client.lay_out((x,), (spec_of(x),), [x.nbytes])
        assert laid is not None
        executor.deliver(laid.places, (factor * x,))
        kept += laid.results((spec_of(x),), ())
    assert all(torch.equal(y, factor * x) for factor, y in enumerate(kept, 1))


def test_integers_travel_in_the_payload_and_their_results_do_not() -> None:
    client, executor = both()
    ids, rows = torch.arange(6), torch.randn(6, 8)
    laid = client.lay_out((ids,), (spec_of(ids),), [rows.nbytes])
    assert laid is not None
    assert laid.places.inputs == (INLINE,) and laid.inline[0] is ids
    assert executor.deliver(laid.places, (rows,)) == ()
    assert torch.equal(laid.results((spec_of(rows),), ())[0], rows)


def test_nothing_to_place_or_no_room() -> None:
    client, _ = both()
    ids, empty = torch.arange(6), torch.empty(0, 4)
    assert client.lay_out((ids,), (spec_of(ids),), []) is None
    assert client.lay_out((empty,), (spec_of(empty),), []) is None
    x = torch.empty(8 * MIB)
    specs = (spec_of(x),)
    assert bytes_needed(specs, [100]) == 32 * MIB + 512
    assert client.lay_out((x,), specs, [100]) is None


def test_a_block_that_came_back_goes_to_the_next_client() -> None:
    blocks = DeviceBlocks(CPU)
    large, small = blocks.take(20 * MIB), blocks.take(1)
    assert (len(large.memory), len(small.memory)) == (32 * MIB, 16 * MIB)
    blocks.give(large)
    blocks.give(small)
    assert blocks.take(MIB) is small
    assert blocks.take(MIB) is large


def test_a_block_waits_for_who_needs_it_as_long_as_there_is_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_memory, "total_bytes", lambda device: 8 * (128 + 16) * MIB)
    blocks = DeviceBlocks(CPU)
    large = blocks.take(128 * MIB)
    blocks.give(large)
    small = blocks.take(MIB)
    assert small is not large
    assert blocks.take(MIB) is large  # there is no more


def test_no_more_than_the_clients_share() -> None:
    blocks = DeviceBlocks(CPU)
    kept = [blocks.take(MIB) for _ in range(3)]
    with pytest.raises(QuotaExceeded, match=r"clients have 50331648 .* and may have 67108864"):
        blocks.take(17 * MIB)
    for much in (65 * MIB, 1 << 70, 10**5000):
        with pytest.raises(QuotaExceeded, match="an exchange may have 67108864"):
            blocks.take(much)
    kept.append(blocks.take(MIB))
    with pytest.raises(QuotaExceeded):
        blocks.take(1)


def test_a_device_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(num_bytes: int, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(device_memory, "allocate", full)
    blocks = DeviceBlocks(CPU)
    for _ in range(2):
        with pytest.raises(QuotaExceeded, match="bytes left for activations"):
            blocks.take(1)
    monkeypatch.undo()
    assert blocks.take(1)  # there is room again


def test_a_device_that_cannot_share_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(block: torch.Tensor) -> dict[str, object]:
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(device_memory, "share", refuse)
    blocks = DeviceBlocks(CPU)
    with pytest.raises(RequestRefused, match="operation not supported"):
        blocks.take(1)
    with pytest.raises(QuotaExceeded, match="may have 0 bytes"):
        blocks.take(1)


def test_what_is_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier copies before the block is written to, the inputs before the frame is sent; results
    before the answer is. On the CPU there is nothing to wait for: by what is waited for when."""
    client, executor = both()
    x, done = torch.ones(4), []
    block = client._block[:16].view(torch.float32)
    monkeypatch.setattr(device_memory, "wait_for_all", lambda d: done.append(block.tolist()))
    laid = client.lay_out((x,), (spec_of(x),), [x.nbytes])
    assert laid is not None
    assert done == [[0.0] * 4, [1.0] * 4]
    place = executor.place(laid.places, 0, torch.float32, (4,))
    assert place is not None
    monkeypatch.setattr(device_memory, "wait_for_stream", lambda d: done.append(place.tolist()))
    executor.deliver(laid.places, (2 * x,))
    executor.deliver(laid.places, (place,))  # is there already
    assert done[2:] == [[2.0] * 4]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_keeps_what_its_parent_had_attached() -> None:
    """It could not let go of memory of CUDA's."""
    block = DeviceBlocks(CPU).take(1)
    ours = device_memory.attach(block.shared, CPU)
    ours[0] = 7
    address = ours.data_ptr()
    kept = multiprocessing.get_context("fork").Queue()

    def child() -> None:
        nonlocal ours
        del ours
        lines = Path("/proc/self/maps").read_text().splitlines()
        starts = [int(line.split("-")[0], 16) for line in lines]
        kept.put(any(start <= address < start + MIB for start in starts))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert kept.get(timeout=30)
    process.join(30)
    assert ours[0] == 7


def test_a_spec_of_no_bytes_has_no_place() -> None:
    assert bytes_needed((TensorSpec(torch.float32, (0, 3)),), []) == 0
