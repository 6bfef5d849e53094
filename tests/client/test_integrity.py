"""The random check of products: never a false alarm, and what it must find.

The arithmetic by itself over many random products; then sessions with executors whose weights
are changed under them, or that lie.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from exchanges import weight_id
from symbiosis import Executor, Session, connect
from symbiosis.client.integrity import Integrity, OwnWord, anchor_of
from symbiosis.client.verifying import Trust
from symbiosis.errors import ConnectionLost, IntegrityError, ModelError
from symbiosis.transport.inproc import InprocChannel
from symbiosis.wire.exchange import Exchange, Op, Result
from symbiosis.wire.frames import Json

QUERY, DOWN = "0.self_attn.q_proj.weight", "1.mlp.down_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def product(op: Op, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As an executor that hosts ``w`` computes it."""
    if op is Op.EMBEDDING:
        return w[x]
    matrix = w if op is Op.LINEAR else w.t()
    return torch.nn.functional.linear(x.to(w.dtype), matrix, bias).to(dtype)


class Trusted:
    """Anchors from the weight at hand."""

    def __init__(self, w: Tensor, bias: Tensor | None) -> None:
        self._w = w
        self._bias = bias

    def anchor(self, op: Op, weight: int) -> object:
        return anchor_of(self._w, op)

    def bias(self, number: int) -> Tensor:
        assert self._bias is not None
        return self._bias


def checker(w: Tensor, bias: Tensor | None, own_word: bool) -> Integrity:
    if not own_word:
        return Integrity(1.0, Trusted(w, bias), lambda _: "w", w.dtype)  # type: ignore[arg-type]

    def ask(op: Op, weight: int, x: Tensor) -> Tensor:
        return product(op, x, w, None, x.dtype)

    biases = {} if bias is None else {1: bias}
    own = OwnWord(ask, lambda _: tuple(w.shape), lambda: biases, w.dtype)
    return Integrity(1.0, own, lambda _: "w", w.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    op: Op
    x: Tensor
    w: Tensor
    bias: Tensor | None
    own_word: bool

    def answer(self) -> Tensor:
        return product(self.op, self.x, self.w, self.bias, self.x.dtype)

    def check(self, y: Tensor) -> None:
        made = checker(self.w, self.bias, self.own_word)
        number = 0 if self.bias is None else 1
        made.exchange(self.op, (1,), (number,), (), self.x, (y,))
        assert made.checked == 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, dtypes and the data that rounds worst: all of one sign, outliers, tiny, huge."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, inner, outer = (draw(st.integers(1, most)) for most in (40, 700, 700))
    hosted, dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    op = draw(st.sampled_from([Op.LINEAR, Op.MATMUL]))
    w = torch.randn(outer, inner, generator=generator, dtype=torch.float64) * 0.05
    x = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    match draw(st.sampled_from(["normal", "positive", "outliers", "tiny", "low rank"])):
        case "positive":
            w, x = w.abs(), x.abs()
        case "outliers":
            x[:, 0] *= 1000
        case "tiny":
            x, w = x * 1e-3, w * 1e-1
        case "low rank":
            w = w[:, :1] @ w[:1]
    bias = torch.randn(outer, generator=generator) if draw(st.booleans()) else None
    w = w if op is Op.LINEAR else w.t().contiguous()
    b = None if bias is None else bias.to(hosted)
    return Case(op, x.to(dtype), w.to(hosted), b, draw(st.booleans()))


@given(cases())
def test_no_false_alarm(case: Case) -> None:
    case.check(case.answer())


def test_no_false_alarm_over_many_products() -> None:
    """Thousands of products with one anchor, of the size of a small model's."""
    torch.manual_seed(1)
    w, bias = torch.randn(384, 256) * 0.05, torch.randn(384)
    for own_word in (True, False):
        made = checker(w, bias, own_word)
        for number in range(1500):
            x = torch.randn(1 + number % 7, 256) * (10.0 ** (number % 9 - 4))
            made.exchange(Op.LINEAR, (1,), (1,), (), x, (product(Op.LINEAR, x, w, bias, x.dtype),))
        assert made.checked == 1500


@pytest.mark.parametrize("size", [1e100, 1e160, 1e300])
def test_what_overflows_when_squared_is_compared_too(size: float) -> None:
    torch.manual_seed(6)
    w, x = torch.randn(40, 30, dtype=torch.float64), torch.randn(3, 30, dtype=torch.float64)
    right = x @ w.t() * size
    checker(w, None, False).exchange(Op.LINEAR, (1,), (0,), (), x * size, (right,))
    for sent in (x, x * size):
        with pytest.raises(IntegrityError, match="3 of 3 rows"):
            wrong = torch.full_like(right, size * 3)
            checker(w, None, False).exchange(Op.LINEAR, (1,), (0,), (), sent, (wrong,))


def test_what_the_weights_dtype_cannot_hold_is_no_false_alarm() -> None:
    w, x = torch.eye(3), torch.tensor([[1e40, 0.0, 0.0]], dtype=torch.float64)
    y = product(Op.LINEAR, x, w, None, x.dtype)
    assert not y.isfinite().all()
    checker(w, None, False).exchange(Op.LINEAR, (1,), (0,), (), x, (y,))


@pytest.mark.parametrize("own_word", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_element_is_found(dtype: torch.dtype, own_word: bool) -> None:
    """One element of a row of 500 is off by a tenth of the row's size, wherever it is; with
    dtypes of 8 or 11 bits, whose roundings add up, by the row's size."""
    torch.manual_seed(5)
    size = 1.0 if dtype.itemsize == 2 else 0.1
    w, x = (torch.randn(500, 300) * 0.05).to(dtype), torch.randn(4, 300).to(dtype)
    made = checker(w, None, own_word)
    y = product(Op.LINEAR, x, w, None, dtype)
    made.exchange(Op.LINEAR, (1,), (0,), (), x, (y,))
    for column in range(500):
        wrong = y.clone()
        wrong[column % 4, column] += (y[column % 4].norm() * size).to(dtype)
        with pytest.raises(IntegrityError, match=r"1 of 4 rows .* linear with w"):
            made.exchange(Op.LINEAR, (1,), (0,), (), x, (wrong,))


@pytest.mark.parametrize("own_word", [True, False])
def test_an_entry_that_flips_is_found(own_word: bool) -> None:
    """As large as the weights themselves, in a matrix of 1024 × 1024; so is a lost row."""
    torch.manual_seed(2)
    w, x = torch.randn(1024, 1024) * 0.02, torch.randn(8, 1024)
    made = checker(w.clone(), None, own_word)
    made.exchange(Op.LINEAR, (1,), (0,), (), x, (x @ w.t(),))
    for change in (0.02, -0.02):
        flipped = w.clone()
        flipped[7, 9] += change
        with pytest.raises(IntegrityError, match=r"[1-8] of 8"):
            made_again = checker(w.clone(), None, own_word)
            made_again.exchange(Op.LINEAR, (1,), (0,), (), x, (x @ flipped.t(),))


@pytest.mark.parametrize("own_word", [True, False])
def test_lookups(own_word: bool) -> None:
    torch.manual_seed(3)
    w, ids = torch.randn(300, 64), torch.randint(0, 300, (2, 9))
    made = checker(w, None, own_word)
    made.exchange(Op.EMBEDDING, (1,), (0,), (), ids, (w[ids],))
    wrong = w[ids].clone()
    wrong[1, 3] = w[(ids[1, 3] + 1) % 300]
    with pytest.raises(IntegrityError, match="1 of 18 rows"):
        made.exchange(Op.EMBEDDING, (1,), (0,), (), ids, (wrong,))


def test_numbers_that_are_none() -> None:
    """A diverged run is no fault of the executor; an infinity out of nowhere is."""
    torch.manual_seed(4)
    w = torch.randn(64, 64)
    made = checker(w, None, True)
    x = torch.full((2, 64), float("nan"))
    made.exchange(Op.LINEAR, (1,), (0,), (), x, (x @ w.t(),))
    x = torch.full((2, 64), 3e38)
    made.exchange(Op.LINEAR, (1,), (0,), (), x, (x @ w.t(),))
    y = torch.ones(2, 64) @ w.t()
    y[1, 1] = float("inf")
    with pytest.raises(IntegrityError, match="1 of 2"):
        made.exchange(Op.LINEAR, (1,), (0,), (), torch.ones(2, 64), (y,))


# Sessions


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """The trusted weights of the tiny Llama with biases."""
    tiny.llama_with_biases().save_pretrained(tmp_path / "trusted")
    return str(tmp_path / "trusted")


def trained(session: Session) -> None:
    """A few steps of LoRA, and text: forward, backward, groups, chains."""
    model = peft.get_peft_model(session.model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    ids = tiny.tokens()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
    model.base_model.generate(input_ids=ids[:1], max_new_tokens=12, do_sample=False)


def generated(session: Session) -> None:
    model = session.model()
    for _ in range(2):
        model.generate(tiny.tokens()[:1], max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("build", [tiny.llama_with_biases, tiny.gpt2, tiny.tied_llama])
def test_an_honest_executor_passes(build: object, anchored: bool, tmp_path: Path) -> None:
    hosted = build()  # type: ignore[operator]
    weights = None
    if anchored:
        hosted.save_pretrained(tmp_path / "trusted")
        weights = str(tmp_path / "trusted")
    with Executor.of(hosted) as base:
        (url,) = base.listen([f"unix://{tmp_path}/base.sock"])
        with connect(url, verify=1.0, weights=weights) as session:
            model = session.model()
            ids = tiny.tokens()
            model(input_ids=ids).logits.sum()
            generated(session)
            assert session.plan(), "no chain was learned"
            stats = session.stats()
            assert stats.verified > 100
            assert stats.unverified == 0


def test_training_is_verified(folder: str) -> None:
    with (
        Executor.of(tiny.llama_with_biases()) as base,
        connect(base, verify=1.0, weights=folder) as session,
    ):
        trained(session)
        assert session.stats().verified > 50


def test_verified_results_have_the_same_bits() -> None:
    ids = tiny.tokens()
    with Executor.of(tiny.llama()) as base, connect(base) as plain, connect(base, verify=1.0) as s:
        with torch.no_grad():
            assert torch.equal(plain.model()(ids).logits, s.model()(ids).logits)
        assert plain.stats().verified == 0


@pytest.mark.parametrize("anchored", [True, False])
def test_weights_that_change_under_a_session(anchored: bool, folder: str) -> None:
    weights = folder if anchored else None
    with (
        Executor.of(tiny.llama_with_biases()) as base,
        connect(base, verify=1.0, weights=weights) as session,
    ):
        generated(session)
        base.weights[weight_id(base, DOWN)].tensor[3, 5] += 0.5
        with pytest.raises(IntegrityError, match=r"1\.mlp\.down_proj\.weight"):
            generated(session)
        with pytest.raises(ConnectionLost, match="closed"):
            session.shipped()


def test_other_weights_from_the_start(folder: str) -> None:
    """Swapped, stale or scaled: the executor's own word agrees with itself, an anchor does not."""
    stale, swapped, scaled = (tiny.llama_with_biases() for _ in range(3))
    with torch.no_grad():
        stale.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.02)
        first, second = (layer.mlp.gate_proj.weight for layer in swapped.model.layers)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        scaled.lm_head.weight.mul_(1.001)
    for hosted in (stale, swapped, scaled, tiny.llama(1, attention_bias=True, mlp_bias=True)):
        with Executor.of(hosted) as base:
            with connect(base, verify=1.0) as session:
                generated(session)
            with pytest.raises(IntegrityError), connect(base, verify=1.0, weights=folder) as s:
                generated(s)


def test_a_computed_buffer_that_was_changed(folder: str) -> None:
    """It has no digest; a little off is another processor, or another release."""
    with Executor.of(tiny.llama_with_biases()) as base:
        shipped = base.weights.shipped
        name = next(name for name in shipped if name.endswith("inv_freq"))
        shipped[name] *= 1 + 1e-6
        with connect(base, verify=0.01, weights=folder) as session:
            session.model()
            digest = session.digest
        shipped[name] *= 3
        with (
            connect(base, verify=0.01, weights=folder, expect_digest=digest) as session,
            pytest.raises(IntegrityError, match=r"inv_freq"),
        ):
            session.model()


def test_a_shipped_parameter_that_was_changed(folder: str) -> None:
    hosted = tiny.llama_with_biases()
    with torch.no_grad():
        hosted.model.norm.weight.mul_(1.5)
    with (
        Executor.of(hosted) as base,
        connect(base, verify=0.01, weights=folder) as session,
        pytest.raises(IntegrityError, match=r"model\.norm\.weight"),
    ):
        session.model()


class _Lying(InprocChannel):
    """An executor that scales what it computes in one direction."""

    def exchange(self, exchange: Exchange) -> Result:
        result = super().exchange(exchange)
        if exchange.op is Op.MATMUL:
            return result
        return result._replace(tensors=tuple(tensor * 1.01 for tensor in result.tensors))


def test_a_scaled_answer() -> None:
    with Executor.of(tiny.llama()) as base:

        def dial(hello: Json) -> _Lying:
            return _Lying(base, hello)

        with Session(dial, "inproc", trust=Trust(verify=1.0)) as session:
            ids = torch.tensor([[3, 4, 5]])
            with pytest.raises(IntegrityError):
                session.model()(ids)


def test_a_share_of_the_exchanges() -> None:
    with Executor.of(tiny.llama()) as base, connect(base, verify=0.2) as session:
        model = session.model()
        with torch.no_grad():
            for _ in range(30):
                model(tiny.tokens())
        stats = session.stats()
        assert 0 < stats.verified < 0.6 * (stats.exchanges + stats.grouped)


def test_what_makes_no_sense_is_refused(tmp_path: Path, folder: str) -> None:
    with Executor.of(tiny.llama()) as base:
        for share in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match="share"):
                connect(base, verify=share)
        with pytest.raises(ValueError, match="verify="):
            connect(base, weights=folder)
        with pytest.raises(ModelError, match="trusted"):
            connect(base, verify=1.0, weights=str(tmp_path / "nothing"))
    with Executor.of(tiny.gpt2()) as base, pytest.raises(ModelError):
        connect(base, verify=1.0, weights=folder)
