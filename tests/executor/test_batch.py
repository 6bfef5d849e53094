"""Several clients' rows as one product: to a tolerance; one alone: bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tiny
from exchanges import exchange, weight_id
from symbiosis.executor import batch, ops
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import Exchange, Op
from symbiosis.wire.views import View


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(tiny.gpt2(), "tiny")


def key(weights: Weights, asked: Exchange, unique: int = 0) -> object:
    return batch.key(asked, ops.check(asked, weights).joinable, unique)


def alone(weights: Weights, asked: Exchange) -> tuple[torch.Tensor, ...]:
    (found,) = batch.compute([asked], weights)
    return found


def test_a_batch_of_one_is_bit_for_bit_torchs_own(weights: Weights) -> None:
    number = weight_id(weights, "0.attn.c_attn.weight")
    x = torch.randn(3, 5, 32)
    (found,) = alone(weights, exchange(Op.MATMUL, number, x))
    assert torch.equal(found, x @ weights[number].tensor)


@pytest.mark.parametrize(
    "shapes", [[(3, 32), (32,), (2, 4, 32)], [(1, 32)] * 5, [(0, 32), (2, 32)]]
)
def test_joined_rows_equal_single_ones(weights: Weights, shapes: list[tuple[int, ...]]) -> None:
    number = weight_id(weights, "0.attn.c_attn.weight")
    bias = weights.vector_ids["transformer.h.0.attn.c_attn.bias"]
    asked = [exchange(Op.MATMUL, number, torch.randn(s), biases=(bias,)) for s in shapes]
    assert len({key(weights, one) for one in asked}) == 1
    for one, results in zip(asked, batch.compute(asked, weights), strict=True):
        assert len(results) == 1
        assert results[0].shape == (*one.specs[0].shape[:-1], 96)
        assert results[0].is_contiguous()
        torch.testing.assert_close(results[0], alone(weights, one)[0], rtol=1e-5, atol=1e-6)


def test_several_weights_at_once(weights: Weights) -> None:
    first, second = (weight_id(weights, f"{n}.mlp.c_fc.weight") for n in (0, 1))
    asked = [exchange(Op.MATMUL, (first, second), torch.randn(n, 32)) for n in (2, 3)]
    for one, results in zip(asked, batch.compute(asked, weights), strict=True):
        for number, found in zip((first, second), results, strict=True):
            torch.testing.assert_close(found, one.tensors[0] @ weights[number].tensor)


def test_joined_lookups_are_exact(weights: Weights) -> None:
    number = weight_id(weights, "wte.weight")
    asked = [
        exchange(Op.EMBEDDING, number, torch.randint(0, 96, shape))
        for shape in ((2, 3), (1,), (), (0, 4))
    ]
    for one, (found,) in zip(asked, batch.compute(asked, weights), strict=True):
        assert torch.equal(found, F.embedding(one.tensors[0], weights[number].tensor))


def test_nan_stays_in_its_own_rows(weights: Weights) -> None:
    number = weight_id(weights, "0.attn.c_attn.weight")
    sick = exchange(Op.MATMUL, number, torch.full((2, 32), torch.nan))
    well = exchange(Op.MATMUL, number, torch.randn(3, 32))
    (poisoned,), (clean,) = batch.compute([sick, well], weights)
    assert poisoned.isnan().all()
    torch.testing.assert_close(clean, alone(weights, well)[0])


def test_what_may_share_a_batch(weights: Weights) -> None:
    number = weight_id(weights, "0.attn.c_proj.weight")
    other = weight_id(weights, "1.attn.c_proj.weight")
    bias = weights.vector_ids["transformer.h.0.attn.c_proj.bias"]
    x = torch.randn(2, 32)
    same = key(weights, exchange(Op.MATMUL, number, x))
    assert same == key(weights, exchange(Op.MATMUL, number, torch.randn(1, 5, 32)), 9)
    different = [
        exchange(Op.LINEAR, number, x),
        exchange(Op.MATMUL, other, x),
        exchange(Op.MATMUL, (number, other), x),
        exchange(Op.MATMUL, number, x, biases=(bias,)),
        exchange(Op.MATMUL, number, x, recipe=(View.TRANSPOSE, 2, 0, 1)),
        exchange(Op.MATMUL, number, x.bfloat16()),
    ]
    assert same not in {key(weights, one) for one in different}


def test_what_cannot_be_joined_is_alone_with_its_key() -> None:
    weights = Weights(tiny.mixtral(), "tiny")
    number = weight_id(weights, "0.mlp.experts.down_proj")
    experts, _, inner = (
        weights[number].tensor.transpose(1, 2).shape[0],
        *weights[number].tensor.shape[1:],
    )
    x = torch.randn(experts, 2, inner)
    asked = exchange(Op.BATCHED_MATMUL, number, x, recipe=(View.TRANSPOSE, 2, 1, 2))
    assert key(weights, asked, 1) != key(weights, asked, 2)
    assert torch.equal(alone(weights, asked)[0], x.bmm(weights[number].tensor.transpose(1, 2)))


def test_rows_on_two_devices_are_joined_on_the_weights() -> None:
    """No second device computes here; one that only knows shapes shows where they go."""
    here, there = torch.zeros(2, 4), torch.zeros(3, 4, device="meta")
    joined = batch.cat((here, there), torch.device("meta"))
    assert joined.device.type == "meta" and joined.shape == (5, 4)
    assert batch.cat((here, here), torch.device("meta")).device.type == "cpu"
