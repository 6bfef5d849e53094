"""The kernel for joined rows: the numbers of `F.linear` to a few units in the last place, and never
in place of it for a client alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from exchanges import exchange, weight_id
from symbiosis.executor import batch, few_rows
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import Op

OUT, IN = 2048, 1024  # just large enough


@pytest.fixture(scope="module")
def w() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(OUT, IN) / IN**0.5


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8, 16, 32, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_linear(w: torch.Tensor, rows: int, with_bias: bool) -> None:
    x = torch.randn(rows, IN)
    bias = torch.randn(OUT) if with_bias else None
    found = few_rows.linear(x, w, bias)
    assert found.is_contiguous() and found.dtype is torch.float32
    torch.testing.assert_close(found, F.linear(x, w, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not few_rows._AVAILABLE, reason="this torch has not both kernels")
@pytest.mark.parametrize("rows, takes_it", [(3, False), (4, True), (32, True), (33, False)])
def test_which_kernel_computes(
    w: torch.Tensor, monkeypatch: pytest.MonkeyPatch, rows: int, takes_it: bool
) -> None:
    others = []

    def seen(*args: torch.Tensor) -> torch.Tensor:
        others.append(args)
        return F.linear(*args)

    monkeypatch.setattr(few_rows, "F", SimpleNamespace(linear=seen))
    few_rows.linear(torch.randn(rows, IN), w, None)
    assert len(others) == (0 if takes_it else 1)


@pytest.mark.parametrize(
    "x, view",
    [
        (torch.randn(8, IN, dtype=torch.float64), lambda w: w.double()),
        (torch.randn(8, IN, dtype=torch.bfloat16), lambda w: w.bfloat16()),
        (torch.randn(8, OUT), lambda w: w.t()),  # not contiguous
        (torch.randn(8, IN)[:, ::2], lambda w: w[:, ::2]),
        (torch.randn(8, 2 * IN)[:, ::2], lambda w: w),  # rows with gaps
        (torch.randn(2, 4, IN), lambda w: w),  # not rows
        (torch.randn(8, IN), lambda w: w[:64]),  # small
    ],
    ids=["float64", "bfloat16", "transposed", "sliced", "gaps", "batched", "small"],
)
def test_everything_else_is_computed_as_well(w: torch.Tensor, x: torch.Tensor, view) -> None:
    weight = view(w)
    tolerance = 2e-2 if x.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        few_rows.linear(x, weight, None), F.linear(x, weight), rtol=tolerance, atol=tolerance
    )


def test_joined_rows_take_it_and_rows_of_one_client_do_not(monkeypatch) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=256, vocab_size=8192, n_positions=32)
    weights = Weights(GPT2LMHeadModel(config), "head of two million weights")
    head = weight_id(weights, "transformer.wte.weight")
    asked = [exchange(Op.LINEAR, head, torch.randn(4, 256)) for _ in range(2)]
    plain = [F.linear(one.tensors[0], weights[head].tensor) for one in asked]
    taken = []

    def watched(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        taken.append(x.shape[0])
        return few_rows.linear(x, w, bias)

    monkeypatch.setattr(batch, "linear_of_joined", watched)
    for one, whole in zip(asked, plain, strict=True):  # 4 rows of one client: bit for bit
        ((alone,),) = batch.compute([one], weights)
        assert torch.equal(alone, whole)
    assert taken == []
    for (found,), whole in zip(batch.compute(asked, weights), plain, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    assert taken == [8]
