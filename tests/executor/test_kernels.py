"""Kernels by measurement: the numbers of torch's to a few units in the last place, the faster one
of each size, and for a client alone torch's unless the operator says otherwise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import symbiosis
import tiny
from exchanges import exchange, weight_id
from symbiosis import Executor, kernels
from symbiosis.client.welcome import kernels_for_one
from symbiosis.errors import ProtocolError
from symbiosis.executor import batch, fastest, walks
from symbiosis.executor.fastest import fastest_kernels
from symbiosis.executor.weights import Weights
from symbiosis.kernels import ROWS, TORCH, Kernels, Product, Size
from symbiosis.wire.exchange import Op

OUT, IN = 1024, 512
ALL = Kernels(Size(p, large, rows) for p in Product for large in (False, True) for rows in ROWS)

pytestmark = pytest.mark.skipif(
    not kernels.has_both(), reason="this torch has not both kernels: it computes everything"
)


@pytest.fixture(scope="module")
def w() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(OUT, IN) / IN**0.5


@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (64,), (300,), (2, 5), (1, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_torchs(w: torch.Tensor, rows: tuple[int, ...], with_bias: bool) -> None:
    for multiply, plain, width, out in (
        (ALL.linear, F.linear, IN, OUT),
        (ALL.matmul, lambda x, w, b: x @ w if b is None else x @ w + b, OUT, IN),
    ):
        x = torch.randn(*rows, width)
        bias = torch.randn(out) if with_bias else None
        found = multiply(x, w, bias)
        assert found.is_contiguous() and found.dtype is torch.float32
        torch.testing.assert_close(found, plain(x, w, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x, view",
    [
        (torch.randn(8, IN, dtype=torch.float64), lambda w: w.double()),
        (torch.randn(8, IN, dtype=torch.bfloat16), lambda w: w.bfloat16()),
        (torch.randn(8, OUT), lambda w: w.t()),  # not contiguous
        (torch.randn(8, IN)[:, ::2], lambda w: w[:, ::2]),
        (torch.randn(8, 2 * IN)[:, ::2], lambda w: w),  # rows with gaps
        (torch.randn(4, 2, IN).transpose(0, 1), lambda w: w),
        (torch.randn(8, IN), lambda w: w[:64]),  # small
        (torch.randn(8, 0), lambda w: w[:, :0]),
        (torch.randn(IN), lambda w: w),
    ],
    ids=[
        "float64",
        "bfloat16",
        "transposed",
        "sliced",
        "gaps",
        "swapped",
        "small",
        "empty",
        "vector",
    ],
)
def test_everything_else_is_computed_as_well(w: torch.Tensor, x: torch.Tensor, view) -> None:
    weight = view(w)
    tolerance = 2e-2 if x.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        ALL.linear(x, weight, None), F.linear(x, weight), rtol=tolerance, atol=tolerance
    )


def taking(seconds: Callable[[bool, int], float], monkeypatch: pytest.MonkeyPatch):
    """A timer by which a pass takes what ``seconds`` says of (by oneDNN?, rows)."""
    passes: list[tuple[bool, int]] = []
    is_onednn = Kernels.is_onednn

    def asked(self: Kernels, product: Product, x: torch.Tensor, w: torch.Tensor) -> bool:
        found = is_onednn(self, product, x, w)
        passes.append((found, len(x)))
        return found

    monkeypatch.setattr(Kernels, "is_onednn", asked)

    def timer(call: Callable[[], object], device: torch.device) -> float:
        passes.clear()
        call()
        (only,) = set(passes)
        return seconds(*only)

    return timer


def test_each_size_has_the_faster_one(w: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's is the faster one from 4 to 63 rows, and level for 2 and 3."""

    def seconds(is_onednn: bool, rows: int) -> float:
        if not is_onednn:
            return 1.0
        return {1: 2.0, 2: 0.99, 4: 0.5, 16: 0.9}.get(rows, 1.1)

    timer = taking(seconds, monkeypatch)
    found = fastest_kernels([w, w.double(), w[:8], w.t(), torch.randn(8)], timer)
    assert found.by_onednn == {Size(p, False, rows) for p in Product for rows in (4, 16)}
    taken = {
        rows: found.is_onednn(Product.LINEAR, torch.ones(rows, IN), w) for rows in range(1, 99)
    }
    assert taken == {rows: 4 <= rows < 64 for rows in range(1, 99)}
    large = torch.empty(1 << 11, 1 << 10)
    assert not found.is_onednn(Product.LINEAR, torch.ones(4, 1 << 10), large)


def test_a_slow_round_is_not_the_measure(w: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([1.0, 9.0, 9.0, 0.5, 1.0, 9.0, 1.0, 9.0] * 100)
    timer = taking(lambda is_onednn, rows: next(rounds), monkeypatch)
    assert fastest_kernels([w], timer).by_onednn == ALL.by_onednn - {
        Size(p, True, rows) for p in Product for rows in ROWS
    }


def test_what_is_measured_is_a_part_of_the_model() -> None:
    matrices = [torch.empty(1000, 10) for _ in range(100)]
    parts = fastest._parts(matrices, 200_000)
    assert sum(part.numel() for part in parts) == 200_000
    assert {part.data_ptr() for part in parts} == {m.data_ptr() for m in matrices[::5]}
    (part,) = fastest._parts([torch.empty(1000, 10)], 200)
    assert part.shape == (20, 10)


def test_nothing_is_measured_of_a_small_model_or_in_another_dtype() -> None:
    def never(call: Callable[[], object], device: torch.device) -> float:
        raise AssertionError("measured")

    assert (
        fastest_kernels((w.tensor for w in Weights(tiny.llama(), "tiny")), never).by_onednn == set()
    )
    assert fastest_kernels([torch.ones(OUT, IN, dtype=torch.bfloat16)], never).by_onednn == set()


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> GPT2LMHeadModel:
    """A model for which oneDNN's kernel is always the faster one."""
    monkeypatch.setattr("symbiosis.executor.weights.fastest_kernels", lambda dense: ALL)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=256, vocab_size=1024, n_positions=64)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that oneDNN computes from now on."""
    taken: list[int] = []
    theirs = kernels._by_onednn

    def watched(x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        taken.append(x.numel() // x.shape[-1])
        return theirs(x, *rest)

    monkeypatch.setattr(kernels, "_by_onednn", watched)
    return taken


@pytest.mark.parametrize("op", [Op.LINEAR, Op.MATMUL])
def test_joined_rows_take_it_and_rows_of_one_client_do_not(
    base: GPT2LMHeadModel, op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(base, "head of a quarter of a million weights")
    weights.choose_kernels("exact")
    assert weights.for_one is TORCH
    head = weight_id(weights, "transformer.wte.weight")
    w = weights[head].tensor
    asked = [exchange(op, head, torch.randn(4, w.shape[op is Op.LINEAR])) for _ in range(2)]
    plain = [one.tensors[0] @ (w.t() if op is Op.LINEAR else w) for one in asked]
    taken = by_onednn(monkeypatch)
    for one, whole in zip(asked, plain, strict=True):  # 4 rows of one client: bit for bit
        ((alone,),) = batch.compute([one], weights)
        assert torch.equal(alone, whole)
    assert taken == []
    for compute in (batch.compute, walks.compute):
        for found, whole in zip(compute(asked, weights), plain, strict=True):
            assert found is not None
            torch.testing.assert_close(found[0], whole, rtol=1e-4, atol=1e-5)
    assert taken == [8, 8]
    weights.choose_kernels("fastest")
    batch.compute(asked[:1], weights)
    assert taken == [8, 8, 4]


@pytest.mark.parametrize("lend", [False, True])
def test_a_model_by_the_fastest_kernels(
    base: GPT2LMHeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lend: bool
) -> None:
    """Prompts, tokens and gradients, of one client whose large results lie in shared memory, or
    that computes with lent weights."""
    local, ids, taken = copy.deepcopy(base), torch.randint(0, 1024, (1, 32)), by_onednn(monkeypatch)
    with Executor(Weights(base, "base", lend=lend), kernels="fastest") as executor:
        (url,) = executor.listen([f"unix://{tmp_path}/base.sock"])
        assert executor.describe()["kernels"] == "fastest"
        with symbiosis.connect(url) as session:
            remote = session.model()
            assert (session.borrowed is not None) is lend
            found = []
            for model in (remote, local):
                embeddings = local.transformer.wte(ids).detach().requires_grad_()
                model(inputs_embeds=embeddings).logits.square().mean().backward()
                with torch.no_grad():
                    logits = model(ids).logits
                    with torch.autocast("cpu", torch.bfloat16):
                        assert model.transformer(ids)[0].isfinite().all()
                tokens = model.generate(ids[:, :8], max_new_tokens=8, do_sample=False)
                found.append((logits, embeddings.grad, tokens))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert 32 in taken and 1 in taken


@torch.no_grad()
def test_with_lent_weights_torch_says_what_does_not_fit(
    base: GPT2LMHeadModel, tmp_path: Path
) -> None:
    with Executor(Weights(base, "base", lend=True), kernels="fastest") as executor:
        (url,) = executor.listen([f"unix://{tmp_path}/base.sock"])
        with symbiosis.connect(url) as session:
            head, conv = session.model().lm_head.weight, session.model().transformer.h[0].mlp.c_fc
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                F.linear(torch.randn(2, 255), head)
            with pytest.raises(RuntimeError, match="must match"):
                F.linear(torch.randn(2, 256), head, torch.randn(3))
            with pytest.raises(RuntimeError, match="dtype"):
                F.linear(torch.randn(2, 256).double(), head)
            x = torch.randn(5, 2, 256)
            each = torch.func.vmap(lambda rows: F.linear(rows, head))(x)
            torch.testing.assert_close(each, F.linear(x, head), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                torch.addmm(torch.ones(2, 1024), x[0], conv.weight),
                torch.addmm(torch.ones(1024), x[0], conv.weight),
                rtol=1e-4,
                atol=1e-4,
            )


def test_sizes_travel() -> None:
    assert Kernels.from_json(json.loads(json.dumps(ALL.to_json()))).by_onednn == ALL.by_onednn
    assert kernels_for_one({}) is TORCH
    wrong = (7, [["linear", True]], [["linear", True, 3]], [["product", True, 1]], [[1, 2, 4]])
    for sizes in (*wrong, [["linear", True, 1]] * 99):
        with pytest.raises(ProtocolError, match="unknown kernels"):
            kernels_for_one({"onednn": sizes})
