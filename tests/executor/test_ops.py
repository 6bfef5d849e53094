"""Each operation of the closed list against torch, and every input that `check` must refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from exchanges import exchange
from symbiosis.errors import InvalidInput, ProtocolError, SymbiosisError
from symbiosis.executor import ops
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import Exchange, Op
from symbiosis.wire.tensors import ITEM_BYTES, TensorSpec
from symbiosis.wire.views import View


class Parts(nn.Module):
    """One weight for each operation; the order below is that of the ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 8)
        self.conv1d = Conv1D(8, 16)
        self.embedding = nn.Embedding(10, 16)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.deconv = nn.ConvTranspose1d(4, 6, 3, stride=2)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 16, 8))


LINEAR, CONV1D, EMBEDDING, CONV, DECONV, EXPERTS = range(1, 7)
CONV_PARAMS = (2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1)
DECONV_PARAMS = (1, 2, 0, 1, 1, 0, 1)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def weights(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    found = Weights(parts, "parts", Path(tmp_path_factory.mktemp("parts")))  # type: ignore[arg-type]
    assert [w.names[0].split(".")[0] for w in found] == [
        "linear", "conv1d", "embedding", "conv", "deconv", "experts"
    ]  # fmt: skip
    return found


def run(weights: Weights, asked: Exchange) -> Tensor:
    """Check and run, as the engine does; the plan must foretell the result."""
    plan = ops.check(asked, weights)
    ops.check_values(asked, plan)
    with torch.no_grad():
        results = ops.run(asked, weights, asked.tensors)
    assert sum(r.numel() * r.element_size() for r in results) == plan.result_bytes
    assert all(result.is_contiguous() for result in results)
    return results[0]


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16), (2, 0, 16)])
def test_linear(weights: Weights, parts: Parts, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    bias = weights.vector_ids["linear.bias"]
    y = run(weights, exchange(Op.LINEAR, LINEAR, x, biases=(bias,)))
    assert torch.equal(y, parts.linear(x))
    assert torch.equal(
        run(weights, exchange(Op.LINEAR, LINEAR, x)), F.linear(x, parts.linear.weight)
    )


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (0, 16)])
def test_matmul(weights: Weights, parts: Parts, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    bias = weights.vector_ids["conv1d.bias"]
    assert torch.equal(
        run(weights, exchange(Op.MATMUL, CONV1D, x, biases=(bias,))), parts.conv1d(x)
    )
    assert torch.equal(run(weights, exchange(Op.MATMUL, CONV1D, x)), x @ parts.conv1d.weight)


def test_several_weights_share_one_input(weights: Weights, parts: Parts) -> None:
    x = torch.randn(4, 8)
    recipe = (View.TRANSPOSE, 2, 0, 1)
    asked = exchange(Op.MATMUL, (LINEAR, LINEAR), x)
    first, second = ops.run(asked, weights, (x,))
    assert torch.equal(first, x @ parts.linear.weight)
    assert torch.equal(first, second)
    assert ops.check(asked, weights).result_bytes == 2 * 4 * 16 * 4
    back = exchange(Op.LINEAR, LINEAR, x, recipe=recipe)
    torch.testing.assert_close(run(weights, back), first)


def test_batched_matmul(weights: Weights, parts: Parts) -> None:
    x = torch.randn(3, 5, 16)
    assert torch.equal(
        run(weights, exchange(Op.BATCHED_MATMUL, EXPERTS, x)), x.bmm(parts.experts.up)
    )


def test_batched_matmul_of_an_input_sent_as_it_lies(weights: Weights, parts: Parts) -> None:
    up, y = parts.experts.up, torch.randn(3, 16, 5)
    found = run(weights, exchange(Op.BATCHED_MATMUL, EXPERTS, y, params=(1,)))
    assert torch.equal(found, y.transpose(1, 2).bmm(up))


@pytest.mark.parametrize("flipped", [False, True])
def test_weight_matmul(weights: Weights, parts: Parts, flipped: bool) -> None:
    x, experts_x = torch.randn(16, 5), torch.randn(3, 8, 4)
    pairs = ((LINEAR, parts.linear.weight, x), (EXPERTS, parts.experts.up, experts_x))
    for number, weight, operand in pairs:
        sent = operand.transpose(-2, -1).contiguous() if flipped else operand
        asked = exchange(Op.WEIGHT_MATMUL, number, sent, params=(1,) if flipped else ())
        expected = weight @ (sent.transpose(-2, -1) if flipped else sent)
        assert torch.equal(run(weights, asked), expected)


@pytest.mark.parametrize("ends", [(2, 5, 6), (0, 0, 6), (6, 6, 6)])
def test_grouped_matmul(weights: Weights, parts: Parts, ends: tuple[int, ...]) -> None:
    x = torch.randn(6, 16)
    y = run(weights, exchange(Op.GROUPED_MATMUL, EXPERTS, x, torch.tensor(ends, dtype=torch.int32)))
    start = 0
    for expert, end in enumerate(ends):
        torch.testing.assert_close(y[start:end], x[start:end] @ parts.experts.up[expert])
        start = end


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding(weights: Weights, parts: Parts, dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 9], [3, 3]], dtype=dtype)
    assert torch.equal(run(weights, exchange(Op.EMBEDDING, EMBEDDING, ids)), parts.embedding(ids))


def test_convolutions(weights: Weights, parts: Parts) -> None:
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    bias = weights.vector_ids["conv.bias"]
    asked = exchange(Op.CONVOLUTION, CONV, x.detach(), biases=(bias,), params=CONV_PARAMS)
    expected = parts.conv(x)
    assert torch.equal(run(weights, asked), expected)
    dy = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, dy)
    back = exchange(Op.CONVOLUTION_INPUT_GRAD, CONV, dy, params=(*CONV_PARAMS, *x.shape))
    torch.testing.assert_close(run(weights, back), gradient)


def test_convolution_with_channels_last(weights: Weights, parts: Parts) -> None:
    """As a client's input lies in memory; torch takes other kernels for it."""
    params = (*CONV_PARAMS[:7], 2, *CONV_PARAMS[8:])
    x = torch.randn(2, 5, 5, 4).movedim(-1, 1).requires_grad_()
    bias = weights.vector_ids["conv.bias"]
    sent = x.detach().movedim(1, -1)
    expected = parts.conv(x)
    asked = exchange(Op.CONVOLUTION, CONV, sent, biases=(bias,), params=params)
    assert torch.equal(run(weights, asked).movedim(-1, 1), expected)
    dy = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, dy)
    back = exchange(
        Op.CONVOLUTION_INPUT_GRAD, CONV, dy.movedim(1, -1).contiguous(), params=(*params, *x.shape)
    )
    torch.testing.assert_close(run(weights, back).movedim(-1, 1), gradient)


def test_transposed_convolution(weights: Weights, parts: Parts) -> None:
    x = torch.randn(2, 4, 5)
    bias = weights.vector_ids["deconv.bias"]
    asked = exchange(Op.CONVOLUTION, DECONV, x, biases=(bias,), params=DECONV_PARAMS)
    assert torch.equal(run(weights, asked), parts.deconv(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_inputs_dtype(
    weights: Weights, parts: Parts, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 16, dtype=dtype)
    y = run(weights, exchange(Op.LINEAR, LINEAR, x))
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x.float(), parts.linear.weight).to(dtype))


x, ids, ends = torch.zeros(3, 16), torch.zeros(3, dtype=torch.int64), torch.zeros(3).int()


@pytest.mark.parametrize(
    "asked",
    [
        exchange(Op.LINEAR, LINEAR, torch.zeros(3, 8)),
        exchange(Op.LINEAR, LINEAR, torch.zeros(())),
        exchange(Op.LINEAR, EXPERTS, x),
        exchange(Op.LINEAR, LINEAR, x.int()),
        exchange(Op.LINEAR, LINEAR, x > 0),
        exchange(Op.LINEAR, LINEAR, x, x),
        exchange(Op.LINEAR, LINEAR),
        exchange(Op.LINEAR, LINEAR, x, biases=(99,)),
        exchange(Op.LINEAR, EMBEDDING, x, biases=(1,)),
        exchange(Op.LINEAR, LINEAR, x, recipe=(View.SELECT, 2, 0, 0)),
        exchange(
            Op.LINEAR, LINEAR, x, recipe=(View.SELECT, 2, 0, 0, View.SELECT, 2, 0, 0), biases=(1,)
        ),
        exchange(Op.LINEAR, (LINEAR, CONV1D), x),
        exchange(Op.LINEAR, (LINEAR, 99), x),
        exchange(Op.MATMUL, CONV1D, torch.zeros(3, 8)),
        exchange(Op.MATMUL, CONV1D, ids),
        exchange(Op.BATCHED_MATMUL, EXPERTS, torch.zeros(2, 5, 16)),
        exchange(Op.BATCHED_MATMUL, EXPERTS, torch.zeros(3, 5, 8)),
        exchange(Op.BATCHED_MATMUL, EXPERTS, torch.zeros(3, 16)),
        exchange(Op.BATCHED_MATMUL, LINEAR, torch.zeros(3, 5, 16)),
        exchange(Op.BATCHED_MATMUL, EXPERTS, torch.zeros(3, 5, 16), biases=(1,)),
        exchange(Op.BATCHED_MATMUL, EXPERTS, torch.zeros(3, 5, 16), params=(1,)),
        exchange(Op.BATCHED_MATMUL, EXPERTS, torch.zeros(3, 5, 16), params=(4,)),
        exchange(Op.BATCHED_MATMUL, EXPERTS, torch.zeros(3, 5, 16), params=(0, 0)),
        exchange(Op.WEIGHT_MATMUL, LINEAR, torch.zeros(8, 3)),
        exchange(Op.WEIGHT_MATMUL, LINEAR, torch.zeros(16, 3), params=(1,)),
        exchange(Op.WEIGHT_MATMUL, LINEAR, torch.zeros(16, 3), params=(2,)),
        exchange(Op.WEIGHT_MATMUL, LINEAR, torch.zeros(16, 3), biases=(1,)),
        exchange(Op.WEIGHT_MATMUL, LINEAR, torch.zeros(1, 16, 3)),
        exchange(Op.WEIGHT_MATMUL, LINEAR, torch.zeros(16)),
        exchange(Op.WEIGHT_MATMUL, EXPERTS, torch.zeros(2, 8, 3)),
        exchange(Op.GROUPED_MATMUL, EXPERTS, x),
        exchange(Op.GROUPED_MATMUL, EXPERTS, x, ends[:2]),
        exchange(Op.GROUPED_MATMUL, EXPERTS, x, ends.long()),
        exchange(Op.GROUPED_MATMUL, EXPERTS, x[None], ends),
        exchange(Op.EMBEDDING, EMBEDDING, x),
        exchange(Op.EMBEDDING, EMBEDDING, ids.to(torch.uint8)),
        exchange(Op.EMBEDDING, EXPERTS, ids),
        exchange(Op.EMBEDDING, EMBEDDING, ids, biases=(1,)),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 5, 5, 5), params=CONV_PARAMS),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 4, 5, 5), params=(2, 0, *CONV_PARAMS[2:])),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 4, 5, 5), params=(*CONV_PARAMS[:-1], 0)),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 4, 5, 5), params=(*CONV_PARAMS[:-1], 3)),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 4, 5, 5), params=()),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 4, 5, 5), params=(9, *CONV_PARAMS[1:])),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 4, 5, 5), params=CONV_PARAMS, biases=(99,)),
        exchange(Op.CONVOLUTION, CONV, torch.zeros(2, 4, 5, 5), params=CONV_PARAMS, biases=(1,)),
        exchange(
            Op.CONVOLUTION_INPUT_GRAD,
            CONV,
            torch.zeros(2, 6, 5, 5),
            params=(*CONV_PARAMS, 2, 4, 9, 9),
        ),
        exchange(Op.CONVOLUTION_INPUT_GRAD, CONV, torch.zeros(2, 6, 5, 5), params=CONV_PARAMS),
        exchange(
            Op.CONVOLUTION_INPUT_GRAD,
            CONV,
            torch.zeros(2, 6, 5, 5),
            params=(*CONV_PARAMS, 2, 4, 5, -5),
        ),
    ],
    ids=lambda asked: f"{asked.op.name.lower()}-{len(asked.specs)}",
)
def test_what_does_not_fit_is_refused_before_it_runs(weights: Weights, asked: Exchange) -> None:
    with pytest.raises((InvalidInput, ProtocolError, SymbiosisError)):
        ops.check(asked, weights)


@pytest.mark.parametrize(
    "bad", [[-1], [10], [0, 3, 10], [2**31], [-(2**63)]], ids=lambda bad: str(bad[-1])
)
def test_ids_out_of_range_are_named(weights: Weights, bad: list[int]) -> None:
    asked = exchange(Op.EMBEDDING, EMBEDDING, torch.tensor(bad))
    plan = ops.check(asked, weights)
    with pytest.raises(InvalidInput, match=f"{bad[-1]} .*10 rows"):
        ops.check_values(asked, plan)


def test_ids_must_fit_every_weight_of_the_exchange(weights: Weights) -> None:
    """An index out of bounds is an error on a CPU, but the end of a GPU's context."""
    asked = exchange(Op.EMBEDDING, (EMBEDDING, LINEAR), torch.tensor([9]))  # the other has 8 rows
    with pytest.raises(InvalidInput):
        ops.check_values(asked, ops.check(asked, weights))


@pytest.mark.parametrize("bad", [(2, 1, 3), (-1, 0, 3), (0, 0, 4), (1, 2, 2**31 - 1)])
def test_expert_offsets_must_rise_within_the_rows(weights: Weights, bad: tuple[int, ...]) -> None:
    asked = exchange(Op.GROUPED_MATMUL, EXPERTS, x, torch.tensor(bad, dtype=torch.int32))
    plan = ops.check(asked, weights)
    with pytest.raises(InvalidInput, match="offsets"):
        ops.check_values(asked, plan)


def test_rows_of_no_expert_do_not_show_old_memory(weights: Weights) -> None:
    """Rows after the last offset belong to nobody: zero, or refused, but never a neighbour's."""
    rows = torch.randn(4096, 16)
    asked = exchange(Op.GROUPED_MATMUL, EXPERTS, rows, torch.zeros(3, dtype=torch.int32))
    secret = [torch.full((4096, 8), 7.0) for _ in range(4)]
    secret.clear()  # the allocator hands the same memory out again
    try:
        result = run(weights, asked)
    except InvalidInput:
        return
    assert not result.any()


number = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**62, -(2**63)]))
dim = st.one_of(st.integers(0, 17), st.sampled_from([2**31, 0xFFFFFFFF]))
shape = st.one_of(
    st.lists(dim, max_size=5).map(tuple), st.sampled_from([(3, 16), (2, 4, 5, 5), (2, 6, 5, 5)])
)
spec = st.builds(TensorSpec, st.sampled_from(list(ITEM_BYTES)), shape)


@given(
    st.builds(
        Exchange,
        st.sampled_from(Op),
        st.lists(st.integers(0, 7), min_size=1, max_size=2).map(tuple),
        st.just((0, 0)),
        st.one_of(
            st.just(()),
            st.just((View.SELECT, 2, 0, 0)),
            st.lists(number, max_size=8).map(tuple),
        ),
        st.one_of(
            st.lists(number, max_size=14).map(tuple),
            st.lists(number, max_size=5).map(lambda ns: (*CONV_PARAMS, *ns)),
            st.tuples(st.integers(0, 10), number, st.just((2, 4, 5, 5))).map(
                lambda m: (*CONV_PARAMS[: m[0]], m[1], *CONV_PARAMS[m[0] + 1 :], *m[2])
            ),
        ),
        st.lists(spec, max_size=2).map(tuple),
        st.just(()),
        st.just(0),
    ),
    st.integers(0, 4),
)
def test_check_never_raises_anything_else(weights: Weights, asked: Exchange, bias: int) -> None:
    asked = asked._replace(biases=(bias,) * len(asked.weights))
    try:
        ops.check(asked, weights)
    except SymbiosisError:
        return
