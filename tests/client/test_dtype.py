"""A client that asks for another dtype than the executor's gets it throughout."""

from __future__ import annotations

import pytest
import torch

import tiny
from symbiosis import Executor, connect


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_than_the_executors(dtype: torch.dtype) -> None:
    local = tiny.llama()
    with Executor.of(tiny.llama()) as executor, connect(executor) as session, torch.no_grad():
        model = session.model(dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        logits = model(tiny.tokens()).logits
        assert logits.dtype == dtype
        assert torch.allclose(logits.float(), local(tiny.tokens()).logits, atol=2e-2)
