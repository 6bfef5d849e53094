"""Products with a remote weight: the hot functions, and the ATen operations beneath them.

Fills the tables of `symbiosis.client.remote_weight`; views, casts and reads are in
`symbiosis.client.lazy`. A product's gradient with respect to its input is an exchange again; with
respect to the weight there is none, for it is frozen.

Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

import symbiosis.client.lazy  # noqa: F401 - fills its part of the tables
from symbiosis.client.remote_weight import ATEN, FUNCTIONS, PRODUCTS, RemoteWeight
from symbiosis.client.session import is_backward
from symbiosis.errors import UnsupportedOperation
from symbiosis.kernels import TORCH, Kernels, Product
from symbiosis.wire.exchange import NO_BIAS, Op

aten = torch.ops.aten

_FEW = 32
"""Rows up to which a product waits for its weight to be read rather than for arithmetic: about 20
where 10 GB/s of float32 meet 100 GFLOP/s, as on two cores."""

_INPUT_GRADIENT = {Op.LINEAR: Op.MATMUL, Op.MATMUL: Op.LINEAR}


class _Product(torch.autograd.Function):
    """x ↦ x Wᵀ + b (LINEAR) or x W + b (MATMUL); saves nothing but the weight's handle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: RemoteWeight, op: Op, bias: int) -> Tensor:
        ctx.weight, ctx.op = weight, op
        return weight._session.product(
            op, x, weight._weight, weight._recipe, bias, forward=True, recording=True
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _input_gradient(dy, ctx.weight, ctx.op), None, None, None


class _InputGradient(torch.autograd.Function):
    """dy ↦ dy W; linear in dy, so that double backward works too."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: RemoteWeight, op: Op) -> Tensor:
        ctx.weight, ctx.op = weight, op
        return weight._session.product(
            op, dy, weight._weight, weight._recipe, NO_BIAS, forward=False, recording=True
        )

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        return _input_gradient(dz, ctx.weight, ctx.op), None, None


def _input_gradient(dy: Tensor, weight: RemoteWeight, op: Op) -> Any:
    return _InputGradient.apply(dy, weight, _INPUT_GRADIENT[op])  # type: ignore[no-untyped-call]


def product(op: Op, x: Tensor, weight: RemoteWeight, bias: Tensor | None = None) -> Tensor:
    """``op`` of x (..., I) with a two-dimensional weight, as torch would compute it here.

    A frozen bias that the executor has too is added there, in the same kernel as in the plain
    model, so that the bits agree; any other is added here. Follows autocast.
    """
    device = weight.device_type
    if torch.is_autocast_enabled(device) and x.is_floating_point():
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != weight.like_dtype:
        raise RuntimeError(
            f"expected input and weight to have the same dtype, but got {x.dtype} and "
            f"{weight.like_dtype} for {weight.weight_name}"
        )
    shared = NO_BIAS if bias is None else _shared_bias(weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _Product.apply(x, weight, op, shared)  # type: ignore[no-untyped-call]
    else:
        y = weight._session.product(
            op,
            x,
            weight._weight,
            weight._recipe,
            shared,
            forward=True,
            recording=torch.is_grad_enabled(),
        )
    return y if bias is None or shared else y + bias.to(y.dtype)


def _shared_bias(weight: RemoteWeight, bias: Tensor) -> int:
    """The id of ``bias`` in the executor if it is provably the same there, else `NO_BIAS`."""
    known = getattr(bias, "symbiosis_vector", None)
    if known is None or bias.requires_grad or bias.device.type != "cpu":
        return NO_BIAS
    number, session, original = known
    same = session is weight._session and bias.dtype == original.dtype
    return number if same and torch.equal(bias, original) else NO_BIAS


def _is_done_here(weight: RemoteWeight, count: int, width: int) -> bool:
    """With a weight that is lent, and an input of ``count`` elements in rows of ``width``: always,
    but for a few rows that others' may join."""
    borrowed = weight._session.borrowed
    if borrowed is None or not borrowed.joins_others or torch.is_grad_enabled():
        return True
    return count > _FEW * width


def _kernels(weight: RemoteWeight, x: Tensor, bias: Tensor | None = None) -> Kernels:
    """By what a product with a lent weight is computed."""
    borrowed = weight._session.borrowed
    return TORCH if borrowed is None else borrowed.kernels(x, bias)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not RemoteWeight or not weight.is_matrix or type(input) is RemoteWeight:
        return NotImplemented
    if (here := weight.here) is not None and _is_done_here(weight, input.numel(), input.shape[-1]):
        return _kernels(weight, input, bias).linear(input, here, bias)
    return product(Op.LINEAR, input, weight, bias)


def _matmul(input: Any, other: Any = None, **unusual: Any) -> Any:
    if type(other) is not RemoteWeight or not other.is_matrix or type(input) is RemoteWeight:
        return NotImplemented
    if unusual or input.dim() < 2:
        return NotImplemented
    if (here := other.here) is not None and _is_done_here(other, input.numel(), input.shape[-1]):
        return _kernels(other, input).matmul(input, here, None)
    return product(Op.MATMUL, input, other)


def _addmm(input: Any, mat1: Any, mat2: Any, **scales: Any) -> Any:
    if type(mat2) is not RemoteWeight or isinstance(mat1, RemoteWeight) or scales:
        return NotImplemented
    if (here := mat2.here) is not None and _is_done_here(mat2, mat1.numel(), mat1.shape[-1]):
        kernels = _kernels(mat2, mat1, input)
        if input.dim() == 1 and kernels.is_onednn(Product.MATMUL, mat1, here):
            return kernels.matmul(mat1, here, input)
        return torch.addmm(input, mat1, here)
    return product(Op.MATMUL, mat1, mat2, input)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None:
        raise UnsupportedOperation(
            f"embedding with max_norm renormalises {weight.weight_name} in place, but it is frozen"
        )
    return _lookup(weight, input)


def _lookup(weight: RemoteWeight, ids: Tensor) -> Tensor:
    if (here := weight.here) is not None:
        if (borrowed := weight._session.borrowed) is not None:
            borrowed.begins()
        if _is_done_here(weight, ids.numel(), 1):
            return F.embedding(ids, here)
    return weight._session.lookup(ids, weight._weight, weight._recipe).to(weight.dtype)


def _requires_grad_(self: Any, requires_grad: bool = True) -> Any:
    """Asking for a gradient makes the parameter local: it can be trained from then on."""
    if type(self) is not RemoteWeight or not requires_grad:
        return NotImplemented
    if _in_parameter_constructor():
        self._to_train = True
    else:
        _set_requires_grad(self, True)
    return self


def _in_parameter_constructor() -> bool:
    """``nn.Parameter(w)`` insists that what ``requires_grad_`` returns is still of w's type; it
    becomes local when the constructor marks it as a parameter (`RemoteWeight._is_param`)."""
    caller = sys._getframe(3)  # this, the handler, __torch_function__, the caller
    return caller.f_code is nn.Parameter.__new__.__code__


def _set_requires_grad(self: Any, requires_grad: bool) -> Any:
    if type(self) is not RemoteWeight or not requires_grad:
        return NotImplemented
    self.localise(f"training {self.weight_name}")
    self.requires_grad = True
    return None


def _set_data(self: Any, value: Any) -> Any:
    """Assigning numbers to a remote weight's ``data`` makes it local; a lazy cast of itself
    (``model.to(dtype)``) changes its dtype or device."""
    if type(self) is not RemoteWeight:
        return NotImplemented
    if type(value) is RemoteWeight:
        twin = value.cast(value.dtype, value.device)
        if self._is_param:
            twin._is_param = True
        torch.utils.swap_tensors(self, twin)
    else:
        self.become(value)
    return None


def _get_data(self: Any) -> Any:
    """``w.data``: the same weight, which remembers where it came from, so that it can be
    changed in place (``w.data += x``)."""
    if type(self) is not RemoteWeight:
        return NotImplemented
    alias = self.cast(self.dtype, self.device)
    alias._origin = self
    return alias


def _share_memory_(self: Any) -> Any:
    """There is no memory to share: a handle serves every process."""
    return self if type(self) is RemoteWeight else NotImplemented


FUNCTIONS.update(
    {
        F.linear: _linear,
        torch.matmul: _matmul,
        torch.mm: _matmul,
        Tensor.matmul: _matmul,
        Tensor.mm: _matmul,
        Tensor.__matmul__: _matmul,
        torch.addmm: _addmm,
        F.embedding: _embedding,
        Tensor.requires_grad_: _requires_grad_,
        Tensor.share_memory_: _share_memory_,
        Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
        Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
        Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    }
)


# ATen: everything that the short ways do not catch, backward formulas among it.


def _aten_mm(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if isinstance(a, RemoteWeight) and isinstance(b, RemoteWeight):
        return NotImplemented
    if isinstance(b, RemoteWeight):
        return _remote_matmul(Op.MATMUL, a, b)
    return _weight_times(a, b)


def _weight_times(weight: RemoteWeight, x: Tensor) -> Tensor:
    """W x. Not (xᵀ Wᵀ)ᵀ, whose bits may differ: methods decompose what comes out of this."""
    x, params = _as_it_lies(x)
    return weight._session.exchange(
        Op.WEIGHT_MATMUL, weight._weight, weight._recipe, (x,), params=params
    )


def _as_it_lies(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """An operand as it lies in memory, which decides the kernel, with the parameter for it."""
    swapped = x.stride(-2) == 1 and x.stride(-1) > 1
    return (x.transpose(-2, -1), (1,)) if swapped else (x, ())


def _remote_matmul(op: Op, x: Tensor, weight: RemoteWeight) -> Tensor:
    backward = is_backward()
    return weight._session.product(
        op,
        x,
        weight._weight,
        weight._recipe,
        NO_BIAS,
        forward=not backward,
        recording=backward or torch.is_grad_enabled(),
    )


def _aten_mv(func: Any, args: Any, kwargs: Any) -> Any:
    matrix, vector = args
    if not isinstance(matrix, RemoteWeight) or isinstance(vector, RemoteWeight):
        return NotImplemented
    return _remote_matmul(Op.LINEAR, vector.unsqueeze(0), matrix).squeeze(0)


def _aten_addmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args
    if isinstance(bias, RemoteWeight) or kwargs.keys() - {"alpha", "beta"}:
        return NotImplemented
    found = _aten_mm(func, (a, b), {})
    if found is NotImplemented:
        return found
    return found * kwargs.get("alpha", 1) + bias * kwargs.get("beta", 1)


def _aten_bmm(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    if isinstance(a, RemoteWeight) and isinstance(b, RemoteWeight):
        return NotImplemented
    if isinstance(a, RemoteWeight):
        return _weight_times(a, b)
    x, params = _as_it_lies(a)
    return b._session.exchange(Op.BATCHED_MATMUL, b._weight, b._recipe, (x,), params=params)


def _aten_baddbmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args
    if isinstance(bias, RemoteWeight):
        return NotImplemented
    found = _aten_bmm(func, (a, b), {})
    if found is NotImplemented:
        return found
    return found * kwargs.get("alpha", 1) + bias * kwargs.get("beta", 1)


def _aten_grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, offsets, *rest = (*args, None)[: max(3, len(args))]
    if not isinstance(weight, RemoteWeight) or isinstance(x, RemoteWeight) or any(rest):
        return NotImplemented
    if x.dim() != 2 or offsets is None or any(v is not None for v in kwargs.values()):
        return NotImplemented
    return weight._session.exchange(
        Op.GROUPED_MATMUL, weight._weight, weight._recipe, (x, offsets.to(torch.int32))
    )


def _aten_embedding(func: Any, args: Any, kwargs: Any) -> Any:
    return _lookup(args[0], args[1])


def _convolution_params(args: Any, dims: int, last: bool) -> tuple[int, ...]:
    """See `symbiosis.executor.ops.ConvolutionParams`."""
    stride, padding, dilation, transposed, output_padding, groups = args
    flags = int(transposed) | (2 if last else 0)
    lists = [
        list(values) * (dims if len(values) == 1 else 1)  # padding="valid" comes as one 0
        for values in (stride, padding, dilation, output_padding)
    ]
    return (dims, *lists[0], *lists[1], *lists[2], flags, *lists[3], groups)


def _channels_last(x: Tensor) -> bool:
    """Does torch take the channels-last kernels for this input?"""
    return x.dim() in (4, 5) and suggest_memory_format(x) != torch.contiguous_format


def _aten_convolution(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, *rest = args
    if not isinstance(weight, RemoteWeight) or isinstance(x, RemoteWeight):
        return NotImplemented
    shared = NO_BIAS if bias is None else _shared_bias(weight, bias)
    last = _channels_last(x)
    y = weight._session.exchange(
        Op.CONVOLUTION,
        weight._weight,
        weight._recipe,
        (x.movedim(1, -1) if last else x,),
        params=_convolution_params(rest, x.dim() - 2, last),
        bias=shared,
    )
    y = y.movedim(-1, 1) if last else y
    if bias is None or shared:
        return y
    return y + bias.view(-1, *[1] * (y.dim() - 2))


def _aten_convolution_backward(func: Any, args: Any, kwargs: Any) -> Any:
    dy, x, weight, _bias_sizes, *rest, mask = args
    if not isinstance(weight, RemoteWeight) or isinstance(dy, RemoteWeight) or mask[1]:
        return NotImplemented
    dx = None
    if mask[0]:
        last = _channels_last(x)
        dx = weight._session.exchange(
            Op.CONVOLUTION_INPUT_GRAD,
            weight._weight,
            weight._recipe,
            (dy.movedim(1, -1) if last else dy,),
            params=(*_convolution_params(rest, x.dim() - 2, last), *x.shape),
        )
        dx = dx.movedim(-1, 1) if last else dx
    channels = [d for d in range(dy.dim()) if d != 1]
    return dx, None, dy.sum(channels) if mask[2] else None


_PRODUCTS = {
    aten.mm.default: _aten_mm,
    aten.mv.default: _aten_mv,
    aten.addmm.default: _aten_addmm,
    aten.bmm.default: _aten_bmm,
    aten.baddbmm.default: _aten_baddbmm,
    aten._grouped_mm.default: _aten_grouped_mm,
    aten.embedding.default: _aten_embedding,
    aten.convolution.default: _aten_convolution,
    aten.convolution_backward.default: _aten_convolution_backward,
}
ATEN.update(_PRODUCTS)
PRODUCTS.update(_PRODUCTS)
