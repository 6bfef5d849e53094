"""Watching what a model does with results until the next product: one pass, now and then.

A result that is being watched is a `Traced` tensor: an ordinary tensor with ordinary numbers
whose arithmetic is written down as the steps of a chain. What has no step (attention) yields plain
tensors, and with them the trail ends. The input of a product is watched, too, from then on: what
follows from it alone (a LoRA's A and B) the client can compute before it asks for the product, so
it is written down as a `Call`. No mode stays on, what is watched is not executed twice, and a trail
that is wrong costs time but never a number, because whoever uses it compares bits
(`symbiosis.client.chains`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from symbiosis.wire.chain import CASTS, Step

aten = torch.ops.aten


class Here(NamedTuple):
    """In place of an argument: the value of a node, in the shape that it had."""

    node: int
    shape: torch.Size


class Call(NamedTuple):
    """What the client computed from an input of a product, and can compute again."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]  # `Here` in place of nodes, and weak references to other tensors
    kwargs: dict[str, Any]  # likewise
    of: int  # the node that it follows from: an input from outside

    @property
    def nodes(self) -> set[int]:
        """Those that it is computed from."""
        return {part.node for part in self._parts if type(part) is Here}

    @property
    def is_lasting(self) -> bool:
        """Are its other tensors still there? (A parameter is; what a pass made is not.)"""
        return all(part() is not None for part in self._parts if type(part) is weakref.ref)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (*self.args, *self.kwargs.values())

    def again(self, values: Mapping[int, Tensor]) -> Tensor:
        """Its result, now, contiguous. Raises KeyError if a tensor has gone, and what ``func``
        does."""
        args = [_present(part, values) for part in self.args]
        kwargs = {key: _present(part, values) for key, part in self.kwargs.items()}
        return self.func(*args, **kwargs).contiguous()


def _present(part: Any, values: Mapping[int, Tensor]) -> Any:
    """An argument of a `Call`, now."""
    if type(part) is Here:
        return values[part.node].view(part.shape)
    if type(part) is not weakref.ref:
        return part
    tensor = part()
    if tensor is None:
        raise KeyError("a tensor of an adapter")
    return tensor


class Node(NamedTuple):
    """How a value came about. ``step`` None: a product returned it, it is from outside, or the
    client computes it (`Trace.calls`)."""

    step: Step | None
    width: int  # of the last dimension
    dtype: torch.dtype
    args: tuple[int, ...] = ()  # numbers of nodes; of a VECTOR its id
    number: float = 0.0
    is_outside: bool = False
    cast: int = 0  # of a CAST, the index into `CASTS`

    @property
    def operands(self) -> tuple[int, ...]:
        """The nodes that it is computed from."""
        return () if self.step is Step.VECTOR else self.args


class Trace:
    """The nodes of one pass. Used by one thread."""

    def __init__(self, vectors: Callable[[Tensor], int]) -> None:
        """``vectors`` gives the id of a shipped vector that a tensor is, or 0."""
        self.nodes: list[Node] = []
        self.calls: dict[int, Call] = {}  # by the node that each has made
        self.open = True
        self._vector_id = vectors
        self._known: dict[int, int] = {}  # id of a tensor → node
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._followed: list[Tensor] = []
        self._repeatable = True  # all that the call under way does
        self._recorder = _Recorder(self)

    def watch(self, tensor: Tensor) -> Tensor:
        """``tensor``, a product's result, watched from here on as a new node."""
        return self._wrap(tensor, self._add(tensor, None))

    def outside(self, tensor: Tensor) -> int:
        """A new node for a value whose trail is not known."""
        return self._add(tensor, None, is_outside=True)

    def follow(self, tensor: Tensor, node: int) -> None:
        """Watch a value from outside in the model's own hands, until `close`."""
        if type(tensor) is Tensor:
            tensor.__class__ = Traced
            tensor._trace = self  # type: ignore[attr-defined]
            self._known[id(tensor)] = node
            self._followed.append(tensor)

    def node_of(self, tensor: Tensor) -> int | None:
        """The node that a tensor is, if its trail is known."""
        return self._known.get(id(tensor))

    def close(self) -> None:
        """The pass is over; tensors that are still around behave like plain ones."""
        self.open = False
        for tensor in self._followed:
            tensor.__class__ = Tensor
            del tensor._trace  # type: ignore[attr-defined]
        self._followed.clear()
        self._known.clear()
        self._kept.clear()

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run ``func`` and watch what comes out."""
        before, self._repeatable = len(self.nodes), True
        with torch._C.DisableTorchFunctionSubclass(), self._recorder:
            out = func(*args, **kwargs)
        if type(out) is not Tensor:
            return out
        node = self._known.get(id(out))
        if node is None or node >= before:
            call = self._call(func, args, kwargs)
            if call is not None:
                node = self._add(out, None) if node is None else node
                self.calls[node] = call
        return out if node is None else self._wrap(out, node)

    def record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An ATen operation ran: is its result a step, the same value, or beyond us?"""
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            self._repeatable = False
        if func._schema.is_mutable:
            for arg in args:
                self._known.pop(id(arg), None)
            return
        result = out[0] if isinstance(out, tuple) and out else out
        if not isinstance(result, Tensor):
            return
        node = self._node(func, args, kwargs, result)
        if node is not None:
            self._known[id(result)] = node
            self._kept.append(result)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Call | None:
        """What has just run, if it can be done again from one input of a product."""
        if not self._repeatable:
            return None
        try:
            call = Call(
                func,
                tuple(self._noted(part) for part in args),
                {key: self._noted(part) for key, part in kwargs.items()},
                0,
            )
        except _CannotRepeat:
            return None
        sources = {self.calls[node].of if node in self.calls else node for node in call.nodes}
        return call._replace(of=sources.pop()) if len(sources) == 1 else None

    def _noted(self, part: Any) -> Any:
        """An argument as a `Call` has it."""
        if not isinstance(part, Tensor):
            if not _is_constant(part):
                raise _CannotRepeat
            return part
        node = self._known.get(id(part))
        if node is not None and (node in self.calls or self.nodes[node].is_outside):
            return Here(node, part.shape)
        if node is not None or type(part) is Traced:
            raise _CannotRepeat
        return weakref.ref(part)

    def _wrap(self, tensor: Tensor, node: int) -> Tensor:
        wrapped = tensor.as_subclass(Traced)
        wrapped._trace = self
        self._known[id(wrapped)] = node
        self._kept.append(wrapped)
        return wrapped

    def _node(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> int | None:
        a = self._known.get(id(args[0])) if args else None
        if func in _SAME:
            same = a is not None and _same_rows(args[0], out) and out.dtype is args[0].dtype
            return a if same else None
        if func is aten._to_copy.default:
            return self._cast(a, args[0], kwargs, out)
        if func in _BINARY:
            return self._binary(func, args, kwargs, out)
        if a is None:
            return None
        if func in _UNARY and not kwargs and len(args) == 1:
            return self._add(out, _UNARY[func], (a,))
        if func is aten.pow.Tensor_Scalar:
            return self._add(out, Step.POWER, (a,), number=float(args[1]))
        if func is aten.mean.dim and _is_last(args) and not kwargs:
            return self._add(out, Step.MEAN, (a,))
        if func is aten.gelu.default:
            tanh = kwargs.get("approximate", "none") == "tanh"
            return self._add(out, Step.GELU_TANH if tanh else Step.GELU, (a,))
        if func is aten.native_layer_norm.default:
            return self._layer_norm(a, args)
        return None

    def _add(
        self,
        out: Tensor,
        step: Step | None,
        args: tuple[int, ...] = (),
        *,
        number: float = 0.0,
        is_outside: bool = False,
        cast: int = 0,
    ) -> int:
        width = out.shape[-1] if out.dim() else 0
        self.nodes.append(Node(step, width, out.dtype, args, number, is_outside, cast))
        return len(self.nodes) - 1

    def _cast(self, a: int | None, x: Tensor, kwargs: Any, out: Tensor) -> int | None:
        if a is None or out.dtype not in CASTS or out.device != x.device:
            return None
        return (
            a
            if out.dtype is x.dtype
            else self._add(out, Step.CAST, (a,), cast=CASTS.index(out.dtype))
        )

    def _binary(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> int | None:
        step, number_step = _BINARY[func]
        if kwargs or len(args) != 2:  # alpha
            return None
        (x, a), (y, b) = [(arg, self._operand(arg, out)) for arg in args]
        if a is None or self.nodes[a].step is Step.VECTOR:  # a chain wants rows first
            (x, a), (y, b) = (y, b), (x, a)
            if step not in (Step.ADD, Step.MULTIPLY):
                return None
        if a is None or self.nodes[a].step is Step.VECTOR:
            return None
        if b is not None:
            return self._add(out, step, (a, b))
        number = _number(y)
        if number is None or number_step is None or not _same_rows(x, out):
            return None
        number = -number if step is Step.SUBTRACT else number
        return self._add(out, number_step, (a,), number=number)

    def _operand(self, arg: Any, out: Tensor) -> int | None:
        """The node of an operand with the rows of the result, or that of a vector."""
        if not isinstance(arg, Tensor):
            return None
        node = self._known.get(id(arg))
        if node is not None:
            rows = arg.dim() == out.dim() and arg.shape[:-1] == out.shape[:-1]
            return node if rows or self.nodes[node].step is Step.VECTOR else None
        return self._vector(arg)

    def _vector(self, tensor: Any) -> int | None:
        if not isinstance(tensor, Tensor) or tensor.dim() != 1:
            return None
        vector = self._vector_id(tensor)
        return self._add(tensor, Step.VECTOR, (vector,)) if vector else None

    def _layer_norm(self, a: int, args: Any) -> int | None:
        x, shape, weight, bias, epsilon = args
        vectors = [self._vector(weight), self._vector(bias)]
        if list(shape) != [x.shape[-1]] or None in vectors:
            return None
        return self._add(x, Step.LAYER_NORM, (a, *vectors), number=epsilon)  # type: ignore[arg-type]


class _Recorder(TorchDispatchMode):
    """Shows a trace the ATen operations of one call."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._trace.record(func, args, kwargs, out)
        return out


class Traced(Tensor):
    """A tensor whose trail is kept while its trace is open; afterwards as good as plain."""

    _trace: Trace

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind is not Traced for kind in types):
            return NotImplemented  # a remote weight knows better what is to be done
        trace = _trace_of(args) or _trace_of(kwargs.values())
        if trace is not None and trace.open:
            return trace.call(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


def plain(tensor: Tensor) -> Tensor:
    """The same numbers as a tensor that nobody watches."""
    if type(tensor) is not Traced:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _trace_of(values: Any) -> Trace | None:
    for value in values:
        if type(value) is Traced:
            return value._trace
        if isinstance(value, (tuple, list)) and (found := _trace_of(value)) is not None:
            return found
    return None


class _CannotRepeat(Exception):
    """An argument is neither a constant, nor a tensor that the client will have again."""


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_constant, value))
    return isinstance(value, (type(None), bool, int, float, str, torch.dtype, torch.device))


def _same_rows(x: Tensor, out: Tensor) -> bool:
    """Are these the same rows, whatever the leading dimensions are called?"""
    return x.numel() == out.numel() and x.dim() > 0 < out.dim() and x.shape[-1] == out.shape[-1]


def _is_last(args: Any) -> bool:
    """``mean(x, [-1], keepdim=True)``?"""
    return len(args) == 3 and args[2] is True and list(args[1]) in ([-1], [args[0].dim() - 1])


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu":
        return float(value)
    return None


_SAME = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
}
"""Rows stay rows, in their order, as long as their number and width do."""

_UNARY = {
    aten.rsqrt.default: Step.RSQRT,
    aten.neg.default: Step.NEGATIVE,
    aten.exp.default: Step.EXP,
    aten.sigmoid.default: Step.SIGMOID,
    aten.tanh.default: Step.TANH,
    aten.relu.default: Step.RELU,
    aten.silu.default: Step.SILU,
}

_BINARY: dict[Any, tuple[Step, Step | None]] = {
    aten.add.Tensor: (Step.ADD, Step.ADD_NUMBER),
    aten.add.Scalar: (Step.ADD, Step.ADD_NUMBER),
    aten.sub.Tensor: (Step.SUBTRACT, Step.ADD_NUMBER),
    aten.mul.Tensor: (Step.MULTIPLY, Step.MULTIPLY_NUMBER),
    aten.mul.Scalar: (Step.MULTIPLY, Step.MULTIPLY_NUMBER),
    aten.div.Tensor: (Step.DIVIDE, None),
}
