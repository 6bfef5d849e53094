"""Every step of a chain against torch, chains of several clients, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from exchanges import exchange, weight_id
from symbiosis.errors import InvalidInput, SymbiosisError
from symbiosis.executor import batch, ops
from symbiosis.executor.weights import Weights
from symbiosis.wire.chain import Chain, Instruction, Step, pack_chain
from symbiosis.wire.exchange import Exchange, Op

torch.manual_seed(0)
x = torch.randn(3, 32)
z = torch.randn(3, 32)
ids = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(tiny.llama_with_biases(), "tiny")


def chain(
    steps: list[Instruction],
    outputs: tuple[int, ...],
    *tensors: Tensor,
    weights: tuple[int, ...] = (1,),
    biases: tuple[int, ...] = (),
) -> Exchange:
    params = pack_chain(Chain(tuple(steps), outputs))
    return exchange(Op.CHAIN, weights, *tensors, params=params, biases=biases)


def run(weights: Weights, asked: Exchange) -> Tensor:
    """Check and run, as the engine does."""
    ops.check_values(asked, ops.check(asked, weights))
    (found,) = ops.run(asked, weights, asked.tensors)
    return found


UNARY: dict[Step, Callable[[Tensor], Tensor]] = {
    Step.MEAN: lambda a: a.mean(-1, keepdim=True),
    Step.RSQRT: torch.rsqrt,
    Step.NEGATIVE: torch.neg,
    Step.EXP: torch.exp,
    Step.SIGMOID: torch.sigmoid,
    Step.TANH: torch.tanh,
    Step.RELU: torch.relu,
    Step.SILU: F.silu,
    Step.GELU: F.gelu,
    Step.GELU_TANH: lambda a: F.gelu(a, approximate="tanh"),
}


@pytest.mark.parametrize("step", UNARY, ids=lambda step: step.name)
def test_steps_on_one_value(weights: Weights, step: Step) -> None:
    found = run(weights, chain([Instruction(step, 0)], (1,), x))
    assert torch.equal(found.nan_to_num(), UNARY[step](x).nan_to_num())


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Step.ADD, x + z),
        (Step.SUBTRACT, x - z),
        (Step.MULTIPLY, x * z),
        (Step.DIVIDE, x / z),
    ],
)
def test_steps_on_two_values(weights: Weights, step: Step, expected: Tensor) -> None:
    found = run(weights, chain([Instruction(step, 0, 1)], (2,), x, z))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Step.ADD_NUMBER, x.abs() + 1.5),
        (Step.MULTIPLY_NUMBER, x.abs() * 1.5),
        (Step.POWER, x.abs() ** 1.5),
    ],
)
def test_steps_with_a_number(weights: Weights, step: Step, expected: Tensor) -> None:
    found = run(weights, chain([Instruction(step, 0, number=1.5)], (1,), x.abs()))
    assert torch.equal(found, expected)


def test_a_cast(weights: Weights) -> None:
    found = run(weights, chain([Instruction(Step.CAST, 0, 1)], (1,), x))
    assert torch.equal(found, x.bfloat16())


def test_products_with_biases_and_a_norm(weights: Weights) -> None:
    model = tiny.llama_with_biases()
    layer = model.model.layers[0]
    q = weight_id(weights, "layers.0.self_attn.q_proj.weight")
    bias = weights.vector_ids["model.layers.0.self_attn.q_proj.bias"]
    norm = weights.vector_ids["model.layers.0.input_layernorm.weight"]
    embedding = weight_id(weights, "embed_tokens.weight")
    steps = [
        Instruction(Step.EMBEDDING, 0, 0),  # 1
        Instruction(Step.POWER, 1, number=2.0),
        Instruction(Step.MEAN, 2),
        Instruction(Step.ADD_NUMBER, 3, number=layer.input_layernorm.variance_epsilon),
        Instruction(Step.RSQRT, 4),
        Instruction(Step.MULTIPLY, 1, 5),
        Instruction(Step.VECTOR, norm),
        Instruction(Step.MULTIPLY, 6, 7),  # 8
        Instruction(Step.LINEAR, 8, 1),
    ]
    asked = chain(steps, (8, 9), ids, weights=(embedding, q), biases=(0, bias))
    with torch.no_grad():
        normed = layer.input_layernorm(model.model.embed_tokens(ids))[0]
        expected = torch.cat([normed, layer.self_attn.q_proj(normed)], 1)
    assert torch.equal(run(weights, asked), expected)


def test_conv1d_and_layer_norm_of_gpt2() -> None:
    model = tiny.gpt2()
    weights = Weights(model, "tiny")
    block = model.transformer.h[0]
    c_attn = weight_id(weights, "h.0.attn.c_attn.weight")
    vector = weights.vector_ids
    steps = [
        Instruction(Step.VECTOR, vector["transformer.h.0.ln_1.weight"]),
        Instruction(Step.VECTOR, vector["transformer.h.0.ln_1.bias"]),
        Instruction(Step.LAYER_NORM, 0, 1, 2, block.ln_1.eps),
        Instruction(Step.MATMUL, 3, 0),
    ]
    bias = vector["transformer.h.0.attn.c_attn.bias"]
    rows = torch.randn(2, model.config.n_embd)
    found = run(weights, chain(steps, (4,), rows, weights=(c_attn,), biases=(bias,)))
    with torch.no_grad():
        assert torch.equal(found, block.attn.c_attn(block.ln_1(rows)))


def test_rms_norm_is_torchs(weights: Weights) -> None:
    norm = weights.vector_ids["model.layers.0.input_layernorm.weight"]
    steps = [Instruction(Step.VECTOR, norm), Instruction(Step.RMS_NORM, 0, 1, number=1e-6)]
    found = run(weights, chain(steps, (2,), x))
    assert torch.equal(found, F.rms_norm(x, (32,), weights.vector(norm), 1e-6))


def test_rows_of_several_clients_are_computed_together(weights: Weights) -> None:
    q = weight_id(weights, "layers.0.self_attn.q_proj.weight")
    steps = [Instruction(Step.ADD, 0, 1), Instruction(Step.SILU, 2), Instruction(Step.LINEAR, 3, 0)]
    asked = [
        chain(steps, (3, 4), torch.randn(n, 1, 32), torch.randn(n, 32), weights=(q,))
        for n in (1, 4, 2)
    ]
    keys = {batch.key(a, ops.check(a, weights).joinable, i) for i, a in enumerate(asked)}
    assert len(keys) == 1
    together = batch.compute(asked, weights)
    for one, (found,) in zip(asked, together, strict=True):
        torch.testing.assert_close(found, run(weights, one))


@pytest.mark.parametrize(
    "asked",
    [
        chain([Instruction(Step.RELU, 1)], (1,), x),  # uses itself
        chain([Instruction(Step.RELU, 7)], (1,), x),
        chain([Instruction(Step.RELU, 0)], (9,), x),
        chain([Instruction(Step.RELU, 0)], (1,), ids),
        chain([Instruction(Step.EMBEDDING, 0, 0)], (0,), ids),  # returns ids
        chain([Instruction(Step.EMBEDDING, 0, 0)], (1,), x),
        chain([Instruction(Step.LINEAR, 0, 3)], (1,), x),
        chain([Instruction(Step.LINEAR, 0, 0)], (1,), x[:, :5]),
        chain([Instruction(Step.LINEAR, 0, 0)], (1,), x, biases=(1, 1)[:1]),
        chain([Instruction(Step.VECTOR, 999)], (1,), x),
        chain([Instruction(Step.VECTOR, 1)], (1,), x),  # returns a vector
        chain([Instruction(Step.ADD, 0, 1)], (2,), x, z[:, :7]),
        chain([Instruction(Step.ADD, 0, 1)], (2,), x, z[:2]),
        chain([Instruction(Step.CAST, 0, 9)], (1,), x),
        chain([Instruction(Step.LAYER_NORM, 0, 0, 0)], (1,), x),
        chain([Instruction(Step.CAST, 0, 1)], (0, 1), x),  # two dtypes
        chain([Instruction(Step.RELU, 0)], (1,)),
        chain([Instruction(Step.RELU, 0)], (1,), torch.tensor(1.0)),
    ],
    ids=[str(i) for i in range(18)],
)
def test_what_does_not_fit_is_refused_before_it_runs(weights: Weights, asked: Exchange) -> None:
    with pytest.raises(SymbiosisError):
        ops.check(asked, weights)


def test_ids_out_of_range_are_named(weights: Weights) -> None:
    embedding = weight_id(weights, "embed_tokens.weight")
    asked = chain(
        [Instruction(Step.EMBEDDING, 0, 0)], (1,), torch.tensor([10**9]), weights=(embedding,)
    )
    plan = ops.check(asked, weights)
    with pytest.raises(InvalidInput, match="1000000000"):
        ops.check_values(asked, plan)


def test_the_memory_of_every_value_is_foretold(weights: Weights) -> None:
    """A long chain of small outputs must not pass for a small one."""
    steps = [Instruction(Step.RELU, i) for i in range(10)]
    assert ops.check(chain(steps, (10,), x), weights).result_bytes >= 11 * x.nbytes
    assert ops.check(chain(steps, (10,) * 50, x), weights).result_bytes >= 60 * x.nbytes


@settings(max_examples=300)
@given(
    st.lists(
        st.builds(
            Instruction,
            st.sampled_from(Step),
            st.integers(0, 8),
            st.integers(0, 8),
            st.integers(0, 8),
            st.floats(),
        ),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.integers(0, 10), min_size=1, max_size=4),
)
def test_what_is_admitted_runs(steps: list[Instruction], outputs: list[int]) -> None:
    """Nothing that `check` lets pass fails in a kernel or has another size than foretold."""
    asked = chain(steps, tuple(outputs), x, z, weights=(2, 3, 5))
    try:
        plan = ops.check(asked, _SHARED)
    except SymbiosisError:
        return
    (found,) = ops.run(asked, _SHARED, asked.tensors)
    assert found.shape[0] == plan.rows == 3
    assert found.nbytes <= plan.result_bytes


_SHARED = Weights(tiny.llama_with_biases(), "tiny")
