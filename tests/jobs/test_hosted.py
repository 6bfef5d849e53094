"""What a job checks before it connects."""

from __future__ import annotations

import pytest
import torch

from symbiosis.errors import SymbiosisError
from symbiosis.jobs.hosted import check_device


def test_training_is_on_the_first_gpu_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Trainer takes no other, whatever the current device."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:0", "cpu"):
        check_device(device, trains=True)
    check_device("cuda:1")
    with pytest.raises(SymbiosisError, match="set CUDA_VISIBLE_DEVICES=1 and use cuda"):
        check_device("cuda:1", trains=True)
