"""CUDA's streams: callers of one process that compute on streams of their own, in order.

What one caller submits another may compute, so all of it is computed on the device's default
stream, which waits for the caller's, and the caller's for it. Knows nothing of exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def on_default(
    device: torch.device, work: Callable[[], T], outputs: Callable[[T], Sequence[torch.Tensor]]
) -> T:
    """What ``work`` returns, with kernels on ``device``'s default stream, after those that the
    caller's has been given so far and before those to come. ``outputs`` are the tensors in it."""
    if device.type != "cuda":
        return work()
    default, current = torch.cuda.default_stream(device), torch.cuda.current_stream(device)
    if current == default:
        return work()
    default.wait_stream(current)
    with torch.cuda.stream(default):
        result = work()
    current.wait_stream(default)
    for tensor in outputs(result):
        if tensor.is_cuda:
            tensor.record_stream(current)  # freed, its memory is not taken before that is done
    return result
