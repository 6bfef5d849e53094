"""Results written into local memory: ``torch.mm(x, w, out=y)`` and ``y.addmm_(x, w)``.

Such an overload means its functional twin (``mm``, ``addmm``) followed by a copy; the twin is
found by its schema, so that whatever has a meaning on a remote weight has one with a destination
too. Knows schemas; knows nothing of exchanges.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symbiosis.client.trace import Traced


class Twin(NamedTuple):
    """The functional overload of one that writes into ``destination``."""

    overload: Any
    destination: str
    by_keyword: bool  # ``out=``; otherwise the first argument


@functools.cache
def twin_of(overload: Any) -> Twin | None:
    """None for an overload that writes nowhere, to several places, or has no twin."""
    arguments = overload._schema.arguments
    written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if len(written) != 1:
        return None
    destination = written[0]
    if destination.kwarg_only:
        found = _of_out(overload, destination.name)
    elif destination is arguments[0] or destination.name == arguments[0].name:
        found = _of_in_place(overload)
    else:
        found = None
    return found and Twin(found, destination.name, destination.kwarg_only)


def write(twin: Twin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the twin, copy its result to the destination and return that, as torch does.

    NotImplemented if the destination is no local tensor. Raises RuntimeError where torch would:
    for a result of another shape or kind of number.
    """
    rest = dict(kwargs)
    target = rest.pop(twin.destination) if twin.by_keyword else args[0]
    if type(target) not in (Tensor, torch.nn.Parameter, Traced):
        return NotImplemented
    value = twin.overload(*args, **rest)
    if not torch.can_cast(value.dtype, target.dtype):
        raise RuntimeError(f"a result of {value.dtype} cannot be written into {target.dtype}")
    if twin.by_keyword and target.shape != value.shape:
        target.resize_(value.shape)
    if target.shape != value.shape:
        raise RuntimeError(
            f"a result of shape {list(value.shape)} cannot be written into {list(target.shape)}"
        )
    return target.copy_(value)


def _of_out(overload: Any, destination: str) -> Any:
    wanted = [a for a in _signature(overload) if a[0] != destination]
    return _pure(overload.overloadpacket, wanted)


def _of_in_place(overload: Any) -> Any:
    namespace, _, name = overload._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return packet and _pure(packet, _signature(overload))


def _signature(overload: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments]


def _pure(packet: Any, signature: list[tuple[str, str]]) -> Any:
    """The overload with that signature that writes nowhere."""
    for name in packet.overloads():
        candidate = getattr(packet, name)
        if not candidate._schema.is_mutable and _signature(candidate) == signature:
            return candidate
    return None
