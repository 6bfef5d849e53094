"""`RemoteWeight`: a tensor with shape, dtype and device whose numbers are in the executor.

To torch, transformers and peft it is a frozen parameter. What consumes it becomes an exchange:
`__torch_function__` is the short way for the hot operations (a linear layer), `__torch_dispatch__`
underneath gives every other ATen operation a meaning or refuses it. The tables of both are
filled by `symbiosis.client.operations`. View operations and dtype casts stay lazy: they change
the view recipe that travels with an exchange. Operations that read the numbers themselves (a
norm, an SVD) fetch the weight, once, and say so in the log.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from symbiosis.client import destinations
from symbiosis.client.session import Session
from symbiosis.errors import UnsupportedOperation
from symbiosis.wire.views import Recipe, View, look

Handler = Callable[..., Any]

FUNCTIONS: dict[Any, Handler] = {}
"""Python-level torch functions with a short way; called as the function itself would be."""

ATEN: dict[Any, Handler] = {}
"""ATen overloads with a remote meaning; called with (overload, args, kwargs)."""

PRODUCTS: set[Any] = set()
"""Of those, the ones that are run here on weights that are lent."""

READS: set[Any] = set()
"""ATen overloads that read the numbers: the weight is fetched and the overload run locally."""


class RemoteWeight(Tensor):
    """One frozen weight of the executor, or a view of it."""

    _session: Session
    _weight: int
    _recipe: Recipe
    _like: Tensor  # on the meta device: shape, strides, dtype
    is_matrix: bool
    like_dtype: torch.dtype
    device_type: str
    _origin: RemoteWeight | None = None  # the parameter whose ``.data`` this is
    _parameter = False
    _to_train = False  # about to become a Parameter that asks for a gradient
    _own = False  # a copy, not yet looked at by another handle: may be changed in place
    _memory: Tensor | None = None  # see `memory`
    here: Tensor | None = None
    """The numbers, if the executor lends them and they can be computed with as they lie."""

    @staticmethod
    def __new__(
        cls, session: Session, weight: int, recipe: Recipe, like: Tensor, device: torch.device
    ) -> RemoteWeight:
        return Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=device,
            requires_grad=False,
        )

    def __init__(
        self, session: Session, weight: int, recipe: Recipe, like: Tensor, device: torch.device
    ) -> None:
        self._session = session
        self._weight = weight
        self._recipe = recipe
        self._like = like
        # Read on every product; as attributes of the tensor they would pass through
        # __torch_function__ each time.
        self.is_matrix = like.dim() == 2
        self.like_dtype = like.dtype
        self.device_type = device.type
        lent = None if session.borrowed is None else session.borrowed.weight(weight, device)
        if lent is not None and lent.dtype == like.dtype:
            self.here = look(lent, recipe)

    @property
    def _is_param(self) -> bool:
        """torch's mark of a Parameter of a custom tensor type. ``nn.Parameter(w)`` sets it as
        its last act; if it asked for a gradient, the parameter becomes a local one here."""
        return self._parameter

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self._parameter = value
        if self._to_train:
            self.localise(f"a new parameter made of {self.weight_name}")
            self.requires_grad = True

    @property
    def weight_name(self) -> str:
        """The first name under which the executor hosts it."""
        return self._session.weights[self._weight].names[0]

    def viewed(self, like: Tensor, step: View, *args: int) -> RemoteWeight:
        """This weight looked at one step further; ``like`` is the outcome on the meta device."""
        self._own = False
        recipe = (*self._recipe, step, len(args), *args)
        return RemoteWeight(self._session, self._weight, recipe, like, self.device)

    def cast(self, dtype: torch.dtype, device: torch.device) -> RemoteWeight:
        """The same weight under another floating dtype or device; nothing is computed."""
        self._own = False
        like, recipe = self._like.to(dtype), self._recipe
        if like.stride() != self._like.stride():  # a cast closes the gaps that a slice has left
            like, recipe = like.contiguous(), (*recipe, View.CONTIGUOUS, 0)
        return RemoteWeight(self._session, self._weight, recipe, like, device)

    def is_same_view(self, other: RemoteWeight) -> bool:
        """Are both the same numbers, in the same shape and dtype?"""
        mine = (self._session, self._weight, self._recipe, self.like_dtype)
        return mine == (other._session, other._weight, other._recipe, other.like_dtype)

    def copied(self) -> RemoteWeight:
        """A copy: the same weight, for it is frozen, until somebody changes the copy in place,
        which makes the copy a local tensor."""
        return self.cast(self.dtype, self.device)._owned()

    def _owned(self) -> RemoteWeight:
        self._own = True
        return self

    def fetch(self, why: str) -> Tensor:
        """The numbers: a local tensor like this one, the caller's own.

        Raises FetchRefused if the executor keeps its weights to itself.
        """
        return self._numbers(why).clone()

    def _numbers(self, why: str) -> Tensor:
        """Like `fetch`, but shared with other readers and not to be changed."""
        if self.here is not None:
            return self.here
        tensor = look(self._session.fetch(self._weight, why), self._recipe)
        return tensor.to(device=self.device, dtype=self.dtype)

    def memory(self) -> Tensor:
        """The numbers at an address of their own that lives as long as this handle: for code
        that reads a tensor's memory, as safetensors does to save it. Fetches."""
        if self._memory is None:
            self._memory = self.fetch(f"saving it{asker()}")
        return self._memory

    def localise(self, why: str) -> None:
        """Turn this very parameter into a local one with the same numbers, in place.

        Needed before it can be trained or changed (``modules_to_save``, merging). Fetches.
        """
        self.become(self.fetch(f"{why}{asker()}"))

    def become(self, values: Tensor) -> None:
        """Turn this very tensor into a local, frozen one that holds ``values``; a parameter
        stays a parameter."""
        local = nn.Parameter(values, requires_grad=False) if self._is_param else values.detach()
        torch.utils.swap_tensors(self, local)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "Parameter, " if self._is_param else ""
        shape = tuple(self.shape)
        return (
            f"RemoteWeight({kind}{self.weight_name}, shape={shape}, dtype={self.dtype}, "
            f"device='{self.device}', in {self._session.url})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteWeight:
        if id(self) not in memo:
            twin = self.copied()
            if self._is_param:
                twin._is_param = True
            memo[id(self)] = twin
        return memo[id(self)]  # type: ignore[no-any-return]

    def cannot_be_saved(self) -> str:
        """Why, and what to do instead."""
        return (
            f"{self.weight_name} cannot be pickled or saved: its numbers are in the executor at "
            f"{self._session.url}. Save the adapter (model.save_pretrained on a PEFT model), or "
            f"fetch the weight explicitly with .fetch(...)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedOperation(self.cannot_be_saved())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            found = handler(*args, **kwargs) if kwargs else handler(*args)
            if found is not NotImplemented:
                return found
        if args and type(args[0]) is RemoteWeight and _changes(func):
            return _change(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs) if kwargs else func(*args)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS and (here := _lent(args)) is not None:
            return func(*here, **kwargs)
        handler = ATEN.get(func)
        if handler is not None:
            found = handler(func, args, kwargs)
            if found is not NotImplemented:
                return found
        if func in READS or (torch.Tag.pointwise in func.tags and not func._schema.is_mutable):
            why = func._schema.name.removeprefix("aten::")
            return func(*_fetched(args, why), **_fetched(kwargs, why))
        twin = destinations.twin_of(func) if func._schema.is_mutable else None
        if twin is not None:
            found = destinations.write(twin, args, kwargs)
            if found is not NotImplemented:
                return found
        raise UnsupportedOperation(
            f"{func} has no meaning on the remote weight {_first(args, kwargs).weight_name}: "
            f"products, lookups, views, casts and reads have one. To work on the numbers "
            f"themselves call .fetch('reason') on the weight"
        )


_HARMLESS = {"requires_grad_", "detach_", "share_memory_"}


def _changes(func: Any) -> bool:
    """Does a tensor method change its first argument? ``add_`` does, and ``w[i] = x``."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name == "__setitem__"


def _change(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter, or its ``.data``, is changed in place: it becomes local first."""
    weight = args[0]
    target = weight if weight._is_param or weight._own else weight._origin
    if target is None:
        raise UnsupportedOperation(
            f"{func.__name__} would change a view of the frozen weight {weight.weight_name}; "
            f"change the parameter itself, its .data or a .clone() of it, which becomes a local "
            f"tensor then"
        )
    if type(target) is RemoteWeight:
        target.localise(f"an in-place {func.__name__}")
    if target is not weight:  # the ``.data`` in the caller's hands stays an alias
        weight.become(target.data)
    return func(weight, *args[1:], **kwargs)


def asker() -> str:
    """`` in pissa_init (peft.tuners.lora.layer)``: the innermost function on the stack that is
    neither ours nor torch's, so that log and refusals name the method that reads a weight."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in ("symbiosis", "torch", "safetensors"):
            return f" in {frame.f_code.co_name} ({module})"
        frame = frame.f_back
    return ""


def _lent(args: tuple[Any, ...]) -> list[Any] | None:
    """With the numbers in place of remote weights; None if one of them is not lent."""
    here = []
    for value in args:
        if isinstance(value, RemoteWeight):
            if value.here is None:
                return None
            value = value.here
        here.append(value)
    return here


def _fetched(value: Any, why: str) -> Any:
    if isinstance(value, RemoteWeight):
        return value._numbers(f"{why}{asker()}")
    if isinstance(value, (tuple, list)):
        return type(value)(_fetched(item, why) for item in value)
    if isinstance(value, dict):
        return {key: _fetched(item, why) for key, item in value.items()}
    return value


def _first(*values: Any) -> RemoteWeight:
    for value in values:
        if isinstance(value, RemoteWeight):
            return value
        if isinstance(value, (tuple, list, dict)):
            items = value.values() if isinstance(value, dict) else value
            try:
                return _first(*items)
            except LookupError:
                continue
    raise LookupError("no remote weight among the arguments")


def _reduce_for_worker(weight: RemoteWeight) -> Any:
    """How a weight goes to a worker process of a DataLoader: as a handle, not as numbers."""
    like = weight._like
    layout = (tuple(like.shape), like.stride(), like.dtype, str(weight.device))
    is_parameter = weight._is_param
    return _rebuild, (weight._session, weight._weight, weight._recipe, layout, is_parameter)


def _rebuild(
    session: Session, weight: int, recipe: Recipe, layout: tuple[Any, ...], is_parameter: bool
) -> RemoteWeight:
    shape, strides, dtype, device = layout
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    rebuilt = RemoteWeight(session, weight, recipe, like, torch.device(device))
    if is_parameter:
        rebuilt._is_param = True
    return rebuilt


ForkingPickler.register(RemoteWeight, _reduce_for_worker)

with contextlib.suppress(ImportError):  # the worker processes of ``datasets``
    from multiprocess.reduction import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
        ForkingPickler as DillPickler,
    )

    DillPickler.register(RemoteWeight, _reduce_for_worker)
