"""A device's memory that several processes of one host see: torch's CUDA IPC, in words of JSON.

One process has a block and shares it; others attach it, on the same device, and see the same bytes.
Unlike the host's sealed memory it can be written to by all of them: CUDA has no other kind. (On the
CPU a block is a file in shared memory, so that all of this runs without a GPU.)
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import re
import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from symbiosis.errors import ProtocolError
from symbiosis.wire.frames import Json

EXCHANGED: tuple[str, ...] = ("cuda",)
"""Types of device whose memory activations go through, where executor and client share a host."""

ALIGNMENT = 512
"""Of a tensor in a block: that of torch's CUDA allocator, by which kernels are chosen."""

_GRANULARITY, _LEAST_BYTES = 2 << 20, 10 << 20
"""torch's CUDA allocator takes a piece of memory for each request of 10 MiB or more, rounded to
2 MiB, if it has none that is free and large enough; smaller ones share theirs. An IPC handle opens
the whole piece: it holds nothing else."""

_COUNTERS = 10_000
"""In torch's file of counters, 8 bytes each."""

_COUNTER = re.compile(rb"/torch_\d+_\d+_\d+")
"""torch's name of the file in which it counts who has a block. It is written to, so that no other
may be named."""


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A block of at least ``num_bytes``, uint8 (n,), not cleared, to itself in memory. Raises
    torch.OutOfMemoryError."""
    size = max(_LEAST_BYTES, -(-num_bytes // _GRANULARITY) * _GRANULARITY)
    with _a_piece_for_itself() if device.type == "cuda" else contextlib.nullcontext():
        return torch.empty(size, dtype=torch.uint8, device=device)


@contextlib.contextmanager
def _a_piece_for_itself() -> Iterator[None]:
    """What torch allocates meanwhile is no part of a larger piece that it keeps, nor of an
    expandable segment (``PYTORCH_ALLOC_CONF``), whose pieces have no IPC handle as a whole."""
    torch.cuda.empty_cache()
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    if not settings.get("expandable_segments"):
        yield
        return
    set_all = torch._C._accelerator_setAllocatorSettings
    others = settings.get("PYTORCH_CUDA_ALLOC_CONF", "")  # a later word of the same setting counts
    set_all(_with(others, "expandable_segments:False"))
    try:
        yield
    finally:
        set_all(_with(others, "expandable_segments:True"))


def _with(settings: str, setting: str) -> str:
    return f"{settings},{setting}" if settings else setting


def share(block: torch.Tensor) -> Json:
    """What other processes of this host need to `attach` ``block``, which must live for as long as
    they have it. Not while another thread computes with it. torch's count of who has it is meant
    for one receiver and wrong with several, so that torch frees the block when this process ends.
    Raises RuntimeError where the device cannot share."""
    storage = block.untyped_storage()
    if block.device.type == "cpu":
        manager, name, num_bytes = storage._share_filename_cpu_()
        return {"manager": _text(manager), "name": _text(name), "bytes": num_bytes}
    shared = storage._share_cuda_()
    _, handle, num_bytes, offset, counter, counter_offset, event, waits = shared
    return {
        "gpu": _uuid(block.device),
        "handle": _text(handle),
        "bytes": num_bytes,
        "offset": offset,
        "counter": [_text(counter), counter_offset],
        "event": _text(event) if waits else None,
    }


def wait_for_all(device: torch.device) -> None:
    """Until all that this process has launched on a GPU is done. A kernel's failure shows here, as
    a RuntimeError."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wait_for_stream(device: torch.device) -> None:
    """The same of the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def total_bytes(device: torch.device) -> int:
    """All that it has."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total)
    return torch.cuda.get_device_properties(device).total_memory


def identity(device: torch.device) -> str:
    """Of a device, the same in every process of this host, whatever number it has there."""
    return "cpu" if device.type == "cpu" else _uuid(device)


def devices_like(device: torch.device) -> dict[str, torch.device]:
    """It, and its peers, whose memory it reaches directly, by their `identity`."""
    if device.type != "cuda":
        return {identity(device): device}
    found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    reaches = torch.cuda.can_device_access_peer
    return {identity(each): each for each in found if each == device or reaches(device, each)}


def is_on(shared: Json, device: torch.device) -> bool:
    """Does the block that is ``shared`` lie on that device? Opens nothing."""
    if device.type != "cuda":
        return device.type == "cpu" and "name" in shared
    return "gpu" in shared and shared["gpu"] == _uuid(device)


def attach(shared: Json, device: torch.device) -> torch.Tensor:
    """The block that another process has `share`d, uint8 (n,), on the ``device`` where it lies. It
    stays attached for as long as a tensor sees it. Raises ProtocolError, and RuntimeError where
    the system does not allow it (another container, or the process has gone)."""
    try:
        num_bytes = _number(shared["bytes"])
        if device.type == "cpu":
            storage = torch.UntypedStorage._new_shared_filename_cpu(
                _data(shared["manager"]), _data(shared["name"]), num_bytes
            )
        else:
            storage = _opened(shared, device, num_bytes)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the executor shares memory of a device in a way that makes no sense: {error!r}"
        ) from None
    block = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    _attached.append(weakref.ref(block, _attached.remove))
    _watch_forks()
    return block


_attached: list[weakref.ref[torch.Tensor]] = []
_of_parent: list[torch.Tensor | None] = []


@functools.cache
def _watch_forks() -> None:
    """A forked child cannot use CUDA, not even to let go of what its parent had attached."""
    os.register_at_fork(after_in_child=lambda: _of_parent.extend(each() for each in _attached))


def _opened(shared: dict[str, Any], device: torch.device, num_bytes: int) -> torch.UntypedStorage:
    counter, counter_offset = shared["counter"]
    if not _COUNTER.fullmatch(_data(counter)) or _number(counter_offset) >= _COUNTERS:
        raise ValueError("that is no counter of torch's")
    event = shared["event"]
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    opened: torch.UntypedStorage = torch.UntypedStorage._new_shared_cuda(
        index,
        _data(shared["handle"]),
        num_bytes,
        _number(shared["offset"]),
        _data(counter),
        counter_offset,
        b"" if event is None else _data(event),
        event is not None,
    )
    return opened


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: object) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return base64.b64decode(text, validate=True)
