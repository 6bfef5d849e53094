"""Every operation of torch that takes a tensor, given a remote weight: right, or refused.

Walks all functions that a tensor subclass can override and all ATEN overloads, with arguments
that work on an ordinary tensor. On the remote weight each gives the same numbers, or an error
that names the weight: never a wrong number in silence.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from symbiosis import Session
from symbiosis.client.remote_weight import ATEN, READS, RemoteWeight
from symbiosis.errors import SymbiosisError

WEIGHT = "model.layers.0.self_attn.q_proj.weight"  # 32 × 32: most products accept it twice

# Not asked: results that are not numbers of the weight, that the arguments do not determine
# (memory as it is found, random numbers, iterations from a random start), or torch's own pickling.
_SKIPPED = re.compile(
    "empty|rand|bernoulli|dropout|multinomial|cauchy|exponential|geometric|normal_|poisson|uniform_"
    "|resize|storage|pin_memory|data_ptr|_cdata|__reduce_ex__|lobpcg|lowrank"
    # arguments that torch does not check, and reads out of bounds or answers anything
    r"|embedding_bag|quantized_lstm_cell|set_|_weight_norm_interface|cumprod_backward"
)

# What torch itself says when it is asked for the memory of a tensor that has none here.
_NO_MEMORY = re.compile("tensor subclasses|data is not allocated|no storage|without storage")


class Case:
    """One call: ``make(w)`` applies an operation to ``w``."""

    def __init__(self, name: str, call: Callable[[Tensor], Any]) -> None:
        self.name, self.call = name, call


def remote(session: Session) -> RemoteWeight:
    info = next(w for w in session.weights.values() if WEIGHT in w.names)
    like = torch.empty(info.shape, device="meta")
    weight = RemoteWeight(session, info.id, (), like, torch.device("cpu"))
    weight._is_param = True
    return weight


def numbers(value: Any) -> Any:
    """What an ordinary tensor would hold in place of each remote one."""
    if isinstance(value, RemoteWeight):
        return value.fetch("comparing")
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return [numbers(item) for item in value]
    return value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.layout != torch.strided or a.is_quantized:
            return b.layout == a.layout
        return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (bool, int, str, torch.dtype, torch.device, type(None))):
        return bool(a == b)
    return type(a) is type(b)


def outcome(call: Callable[[Tensor], Any], weight: Tensor) -> tuple[Any, Any]:
    """The result, and what the weight holds afterwards."""
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = numbers(call(weight))
        return result, numbers(weight)


def wrong(cases: Iterator[Case], session: Session, plain: Tensor) -> tuple[list[str], int, int]:
    """Cases with a wrong number; how many were right, how many refused."""
    found, right, refused = [], 0, 0
    for case in cases:
        try:
            expected = outcome(case.call, torch.nn.Parameter(plain.clone(), requires_grad=False))
        except Exception:  # noqa: BLE001 - these arguments are not for this operation
            continue
        try:
            actual = outcome(case.call, remote(session))
        except (SymbiosisError, NotImplementedError):
            refused += 1
        except Exception as error:  # noqa: BLE001 - a crash is not wrong, but not a refusal
            if _NO_MEMORY.search(str(error)):
                refused += 1
            else:
                found.append(f"{case.name}: {type(error).__name__}: {error}")
        else:
            if same(list(expected), list(actual)):
                right += 1
            else:
                found.append(f"{case.name}: another result")
    return found, right, refused


def arguments() -> Iterator[tuple[str, Callable[[Tensor], tuple[Any, ...]]]]:
    """Argument lists, with the weight in every place."""
    other, ids, mask = _OTHER, _IDS, _OTHER > 0
    rest = [(), (other,), (0,), (1,), (2.0,), (0, 1), ([0],), ((32, 32),), (other, other)]
    rest += [
        (ids,),
        (mask,),
        (mask, other),
        (0, ids),
        (0, ids, other),
        (0, 0, 4),
        (4, 0),
        (mask, 1.0),
    ]
    for more in rest:
        yield f"(w, {len(more)})", lambda w, more=more: (w, *more)
    yield "(x, w)", lambda w: (other, w)
    yield "(x, x, w)", lambda w: (other, other, w)
    yield "(x, w, x)", lambda w: (other, w, other)
    yield "(w, w)", lambda w: (w, w)
    yield "([w, x],)", lambda w: ([w, other],)
    yield "(mask, w, x)", lambda w: (mask, w, other)
    yield "(ids, w)", lambda w: (ids, w)
    yield "(equation, x, w)", lambda w: ("ti,oi->to", other, w)
    yield "(x, 0, ids, w)", lambda w: (other, 0, ids, w)


def functions() -> Iterator[Case]:
    """All that torch lets a subclass override: functions, methods, properties."""
    for func in torch.overrides.get_testing_overrides():
        name = torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))
        distributed = str(getattr(func, "__module__", "")).startswith("torch.distributed")
        if distributed or _SKIPPED.search(name):
            continue
        for text, make in arguments():
            yield Case(f"{name}{text}", lambda w, f=func, make=make: f(*own(make(w), w)))


def own(args: Any, weight: Tensor) -> Any:
    """Arguments that may be changed in place: the next call must not see it."""
    if isinstance(args, (tuple, list)):
        return type(args)(own(arg, weight) for arg in args)
    return args.clone() if isinstance(args, Tensor) and args is not weight else args


_VALUES: dict[str, tuple[Any, ...]] = {
    "int": (0, 1),
    "SymInt": (0, 1),
    "float": (1.0,),
    "number": (2.0,),
    "bool": (False,),
    "str": ("none",),
    "List[int]": ([0], [1, 1], [32, 32]),
    "List[Optional[Tensor]]": ([torch.arange(4)],),
}


def overloads() -> Iterator[Case]:
    """ATEN's overloads, as they arrive beneath the functions: from autograd, and from C++."""
    for name in sorted(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket) or _SKIPPED.search(name):
            continue
        for overload in packet.overloads():
            func = getattr(packet, overload)
            if not name.startswith("_") or func in ATEN or func in READS:
                yield from _calls(func)


def _calls(func: Any) -> Iterator[Case]:
    """Calls of ``func`` with the weight in the place of each tensor that it must have."""
    required = [a for a in func._schema.arguments if not a.has_default_value() and not a.kwarg_only]
    kinds = [str(argument.type) for argument in required]
    tensors = [place for place, kind in enumerate(kinds) if kind in ("Tensor", "List[Tensor]")]
    if not all(kind in _VALUES or place in tensors for place, kind in enumerate(kinds)):
        return
    others = [place for place in range(len(kinds)) if place not in tensors]
    for plain_values in itertools.product(*(_VALUES[kinds[place]] for place in others)):
        fixed = dict(zip(others, plain_values, strict=True))
        for here, partner in itertools.product(tensors, (_OTHER, _IDS)):

            def call(
                w: Tensor, here: int = here, fixed: Any = fixed, partner: Any = partner
            ) -> Any:
                args = [fixed.get(place) for place in range(len(kinds))]
                for place in tensors:
                    value = w if place == here else partner.clone()
                    args[place] = [value] if kinds[place] == "List[Tensor]" else value
                result = func(*args)
                return result, [args[place] for place in tensors if args[place] is not w]

            yield Case(f"{func}, weight at {here}, {plain_values}", call)


BY_OTHER_TESTS = {
    "aten.convolution.default",  # test_products
    "aten.convolution_backward.default",
    "aten.sum.dim_IntList",  # the functions above reach these
    "aten.mean.dim",
    "aten.norm.ScalarOpt_dim",
}
"""Overloads with lists that must fit the weight."""

_OTHER = torch.linspace(-1, 1, 32 * 32).view(32, 32)
_IDS = torch.arange(32).view(1, 32)


@pytest.fixture
def plain(local: torch.nn.Module) -> Tensor:
    return local.get_parameter(WEIGHT).detach()


@pytest.mark.parametrize(("cases", "least"), [(functions, 3000), (overloads, 1000)])
def test_right_or_refused(
    session: Session, plain: Tensor, cases: Callable[[], Iterator[Case]], least: int
) -> None:
    found, right, refused = wrong(cases(), session, plain)
    assert not found
    assert right > least, "the walk does not reach what it should"
    assert refused > 100


def test_the_walk_reaches_the_tables() -> None:
    """Every overload with a meaning of its own is among those asked."""
    asked = {case.name.split(",")[0] for case in overloads()}
    meant = {str(func) for func in {*ATEN, *READS} if not _SKIPPED.search(str(func))}
    assert meant - asked <= BY_OTHER_TESTS


def test_a_wrong_number_is_found(session: Session, plain: Tensor) -> None:
    """That the walk can fail."""

    def twice(w: Tensor) -> Tensor:
        return w.sum() * (2 if isinstance(w, RemoteWeight) else 1)

    found, *_ = wrong(iter([Case("twice", twice)]), session, plain)
    assert found == ["twice: another result"]


def custom(w: Tensor) -> Tensor:
    """An operation that torch did not bring along."""
    library = torch.library.Library("symbiosis_test", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x + x, "CompositeExplicitAutograd")
    return torch.ops.symbiosis_test.double(w)  # type: ignore[no-any-return]


def test_an_operation_of_another_library_is_refused(session: Session, plain: Tensor) -> None:
    weight = remote(session)
    with pytest.raises(SymbiosisError, match=r"double.*q_proj.*\.fetch\("):
        custom(weight)
