"""View recipes: each step does what torch does; malformed ones are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ProtocolError
from symbiosis.wire.views import View, look


def steps(*named: tuple[View, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(number for step, args in named for number in (step, len(args), *args))


CASES: list[tuple[View, tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = [
    (View.TRANSPOSE, (0, 1), lambda w: w.transpose(0, 1)),
    (View.PERMUTE, (2, 0, 1), lambda w: w.permute(2, 0, 1)),
    (View.SELECT, (0, -1), lambda w: w[-1]),
    (View.SLICE, (1, 1, 4, 2), lambda w: w[:, 1:4:2]),
    (View.RESHAPE, (6, 4), lambda w: w.view(6, 4)),
    (View.UNSQUEEZE, (1,), lambda w: w.unsqueeze(1)),
    (View.SQUEEZE, (0, 1), lambda w: w.squeeze((0, 1))),
    (View.EXPAND, (5, 2, 3, 4), lambda w: w.expand(5, 2, 3, 4)),
]


@pytest.mark.parametrize(
    ("step", "args", "plain"), CASES, ids=lambda case: getattr(case, "name", "")
)
def test_each_step_is_torchs_own_and_copies_nothing(
    step: View, args: tuple[int, ...], plain: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight = torch.randn(2, 3, 4)
    seen = look(weight, steps((step, args)))
    assert torch.equal(seen, plain(weight))
    assert seen.stride() == plain(weight).stride()
    assert seen.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_steps_follow_one_another() -> None:
    weight = torch.randn(4, 6)
    recipe = steps((View.TRANSPOSE, (0, 1)), (View.CONTIGUOUS, ()), (View.RESHAPE, (3, 8)))
    assert torch.equal(look(weight, recipe), weight.t().contiguous().view(3, 8))
    assert look(weight, ()) is weight


@pytest.mark.parametrize("recipe", [(1,), (1, 2, 0), (1, -1), (0, 0), (10, 0), (1, 2**62)])
def test_malformed_recipes(recipe: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        look(torch.zeros(2, 3), recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        (View.TRANSPOSE, 1, 0),
        (View.TRANSPOSE, 2, 0, 7),
        (View.SELECT, 2, 0, 2),
        (View.SLICE, 4, 0, 0, 2, 0),
        (View.RESHAPE, 1, 7),
        (View.RESHAPE, 0),
        (View.PERMUTE, 0),
        (View.EXPAND, 2, 5, 3),
        (View.UNSQUEEZE, 1, 2**62),
    ],
)
def test_recipes_that_do_not_fit_raise_what_is_documented(recipe: tuple[int, ...]) -> None:
    with pytest.raises((ProtocolError, IndexError, RuntimeError, TypeError, ValueError)):
        look(torch.zeros(2, 3), recipe)


number = st.one_of(st.integers(-3, 6), st.sampled_from([-(2**63), 2**63 - 1, 2**31]))
loose_steps = st.lists(
    st.tuples(st.integers(0, 10), st.lists(number, max_size=4)).map(
        lambda step: (step[0], len(step[1]), *step[1])
    ),
    max_size=4,
).map(lambda found: tuple(n for step in found for n in step))


@given(st.one_of(loose_steps, st.lists(number, max_size=12).map(tuple)))
def test_random_recipes_raise_only_what_is_documented(recipe: tuple[int, ...]) -> None:
    try:
        seen = look(torch.zeros(2, 3, 4), recipe)
    except (ProtocolError, IndexError, RuntimeError, TypeError, ValueError):
        return
    assert isinstance(seen, torch.Tensor)
