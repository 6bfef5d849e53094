"""What may be done with a remote weight: the hot functions, the ATen operations, the reads.

Fills the tables of `symbiosis.client.remote_weight`. A product's gradient with respect to its
input is an exchange again; with respect to the weight there is none, for it is frozen.

Shapes: T rows, I in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from symbiosis.client.remote_weight import ATEN, FUNCTIONS, READS, RemoteWeight
from symbiosis.errors import UnsupportedOperation
from symbiosis.wire.exchange import NO_BIAS, Op
from symbiosis.wire.views import View

aten = torch.ops.aten

_INPUT_GRADIENT = {Op.LINEAR: Op.MATMUL, Op.MATMUL: Op.LINEAR}


class _Product(torch.autograd.Function):
    """x ↦ x Wᵀ + b (LINEAR) or x W + b (MATMUL); saves nothing but the weight's handle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: RemoteWeight, op: Op, bias: int) -> Tensor:
        ctx.weight, ctx.op = weight, op
        return weight._session.product(op, x, weight._weight, weight._recipe, bias, forward=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _input_gradient(dy, ctx.weight, ctx.op), None, None, None


class _InputGradient(torch.autograd.Function):
    """dy ↦ dy W; linear in dy, so that double backward works too."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: RemoteWeight, op: Op) -> Tensor:
        ctx.weight, ctx.op = weight, op
        return weight._session.product(
            op, dy, weight._weight, weight._recipe, NO_BIAS, forward=False
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
        y = weight._session.product(op, x, weight._weight, weight._recipe, shared, forward=True)
    return y if bias is None or shared else y + bias.to(y.dtype)


def _shared_bias(weight: RemoteWeight, bias: Tensor) -> int:
    """The id of ``bias`` in the executor if it is provably the same there, else `NO_BIAS`."""
    known = getattr(bias, "symbiosis_bias", None)
    if known is None or bias.requires_grad or bias.device.type != "cpu":
        return NO_BIAS
    number, session, original = known
    same = session is weight._session and bias.dtype == original.dtype
    return number if same and torch.equal(bias, original) else NO_BIAS


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not RemoteWeight or not weight.is_matrix or type(input) is RemoteWeight:
        return NotImplemented
    return product(Op.LINEAR, input, weight, bias)


def _matmul(input: Any, other: Any, **unusual: Any) -> Any:
    if type(other) is not RemoteWeight or not other.is_matrix or type(input) is RemoteWeight:
        return NotImplemented
    if unusual or input.dim() < 2:
        return NotImplemented
    return product(Op.MATMUL, input, other)


def _addmm(input: Any, mat1: Any, mat2: Any, **scales: Any) -> Any:
    if type(mat2) is not RemoteWeight or isinstance(mat1, RemoteWeight) or scales:
        return NotImplemented
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
    found = weight._session.exchange(Op.EMBEDDING, weight._weight, weight._recipe, (ids,))
    return found.to(weight.dtype)


def _requires_grad_(self: Any, requires_grad: bool = True) -> Any:
    """Asking for a gradient makes the parameter local: it can be trained from then on."""
    if type(self) is not RemoteWeight or not requires_grad:
        return NotImplemented
    _set_requires_grad(self, True)
    return self


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
        if getattr(self, "_is_param", False):
            twin._is_param = True
        torch.utils.swap_tensors(self, twin)  # type: ignore[no-untyped-call]
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
    return _remote_matmul(Op.LINEAR, b.t(), a).t()  # W x = (xᵀ Wᵀ)ᵀ


def _remote_matmul(op: Op, x: Tensor, weight: RemoteWeight) -> Tensor:
    return weight._session.product(op, x, weight._weight, weight._recipe, NO_BIAS, forward=False)


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
    if isinstance(b, RemoteWeight):
        return b._session.exchange(Op.BATCHED_MATMUL, b._weight, b._recipe, (a,))
    flipped = _transposed(a, 1, 2)
    x = b.transpose(1, 2)
    found = a._session.exchange(Op.BATCHED_MATMUL, a._weight, flipped._recipe, (x,))
    return found.transpose(1, 2)


def _aten_baddbmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, a, b = args
    if isinstance(bias, RemoteWeight):
        return NotImplemented
    found = _aten_bmm(func, (a, b), {})
    return found * kwargs.get("alpha", 1) + bias * kwargs.get("beta", 1)


def _aten_grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, offsets, *rest = args
    if not isinstance(weight, RemoteWeight) or isinstance(x, RemoteWeight) or any(rest):
        return NotImplemented
    if x.dim() != 2 or offsets is None or any(v is not None for v in kwargs.values()):
        return NotImplemented
    return weight._session.exchange(
        Op.GROUPED_MATMUL, weight._weight, weight._recipe, (x, offsets.to(torch.int32))
    )


def _aten_embedding(func: Any, args: Any, kwargs: Any) -> Any:
    return _lookup(args[0], args[1])


def _convolution_params(args: Any) -> tuple[int, ...]:
    """See `symbiosis.executor.ops.ConvolutionParams`."""
    stride, padding, dilation, transposed, output_padding, groups = args
    lists = (*stride, *padding, *dilation, int(transposed), *output_padding)
    return (len(stride), *lists, groups)


def _aten_convolution(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, *rest = args
    if not isinstance(weight, RemoteWeight) or isinstance(x, RemoteWeight):
        return NotImplemented
    shared = NO_BIAS if bias is None else _shared_bias(weight, bias)
    y = weight._session.exchange(
        Op.CONVOLUTION,
        weight._weight,
        weight._recipe,
        (x,),
        params=_convolution_params(rest),
        bias=shared,
    )
    if bias is None or shared:
        return y
    return y + bias.view(-1, *[1] * (y.dim() - 2))


def _aten_convolution_backward(func: Any, args: Any, kwargs: Any) -> Any:
    dy, x, weight, _bias_sizes, *rest, mask = args
    if not isinstance(weight, RemoteWeight) or isinstance(dy, RemoteWeight) or mask[1]:
        return NotImplemented
    dx = None
    if mask[0]:
        params = (*_convolution_params(rest), *x.shape)
        dx = weight._session.exchange(
            Op.CONVOLUTION_INPUT_GRAD, weight._weight, weight._recipe, (dy,), params=params
        )
    channels = [d for d in range(dy.dim()) if d != 1]
    return dx, None, dy.sum(channels) if mask[2] else None


# Views and casts: lazy.


def _view(weight: RemoteWeight, func: Any, args: Any, kwargs: Any, step: View, *ints: int) -> Any:
    return weight.viewed(func(weight._like, *args[1:], **kwargs), step, *ints)


def _transposed(weight: RemoteWeight, dim0: int, dim1: int) -> RemoteWeight:
    return weight.viewed(weight._like.transpose(dim0, dim1), View.TRANSPOSE, dim0, dim1)


def _aten_t(func: Any, args: Any, kwargs: Any) -> Any:
    if args[0].dim() < 2:
        return args[0].cast(args[0].dtype, args[0].device)
    return _transposed(args[0], 0, 1)


def _aten_slice(func: Any, args: Any, kwargs: Any) -> Any:
    weight = args[0]
    given = tuple(args[1:])
    dim, start, end, step = given + (0, None, None, 1)[len(given) :]
    size = weight.shape[dim]
    ints = (dim, 0 if start is None else start, size if end is None else min(end, size), step)
    return weight.viewed(func(weight._like, *ints), View.SLICE, *ints)


def _aten_split(func: Any, args: Any, kwargs: Any) -> Any:
    weight, sizes = args[:2]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    parts, start = [], 0
    for part in func(weight._like, sizes, dim):
        end = start + part.shape[dim]
        parts.append(weight.viewed(part, View.SLICE, dim, start, end, 1))
        start = end
    return parts


def _aten_reshape(func: Any, args: Any, kwargs: Any) -> Any:
    like = func(args[0]._like, *args[1:], **kwargs)
    return args[0].viewed(like, View.RESHAPE, *like.shape)


def _aten_squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    like = func(args[0]._like, *args[1:], **kwargs)
    return args[0].viewed(like, View.RESHAPE, *like.shape)


def _aten_expand(func: Any, args: Any, kwargs: Any) -> Any:
    like = func(args[0]._like, *args[1:], **kwargs)
    return args[0].viewed(like, View.EXPAND, *like.shape)


def _aten_alias(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].cast(args[0].dtype, args[0].device)


def _aten_clone(func: Any, args: Any, kwargs: Any) -> Any:
    """A frozen weight never changes, so that its clone is the weight; only strides may differ."""
    like = func(args[0]._like, *args[1:], **kwargs)
    if like.stride() == args[0]._like.stride():
        return _aten_alias(func, args, kwargs)
    return args[0].viewed(like, View.CONTIGUOUS)


def _aten_to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    device = kwargs.get("device") or weight.device
    return weight.cast(dtype, torch.device(device))


def _aten_copy_(func: Any, args: Any, kwargs: Any) -> Any:
    """Copying the numbers out reads them; copying into a frozen weight is refused."""
    target, source = args[:2]
    if isinstance(target, RemoteWeight):
        return NotImplemented
    return func(target, source._numbers("copy_"), *args[2:])


def _aten_like(func: Any, args: Any, kwargs: Any) -> Any:
    """``zeros_like``, ``randn_like``, ...: an ordinary local tensor."""
    weight = args[0]
    kwargs = {**kwargs, "device": kwargs.get("device") or weight.device}
    if kwargs["device"] == torch.device("meta"):
        return func(weight._like, *args[1:], **kwargs)
    plain = torch.empty(0, dtype=weight.dtype, device=weight.device).expand(0)
    like = plain.new_empty(()).expand(weight.shape)
    return func(like, *args[1:], **{**kwargs, "memory_format": torch.contiguous_format})


def _aten_new(func: Any, args: Any, kwargs: Any) -> Any:
    plain = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
    return func(plain, *args[1:], **kwargs)


ATEN.update(
    {
        aten.mm.default: _aten_mm,
        aten.mv.default: _aten_mv,
        aten.addmm.default: _aten_addmm,
        aten.bmm.default: _aten_bmm,
        aten.baddbmm.default: _aten_baddbmm,
        aten._grouped_mm.default: _aten_grouped_mm,
        aten.embedding.default: _aten_embedding,
        aten.convolution.default: _aten_convolution,
        aten.convolution_backward.default: _aten_convolution_backward,
        aten.t.default: _aten_t,
        aten.transpose.int: lambda f, a, k: _view(a[0], f, a, k, View.TRANSPOSE, *a[1:]),
        aten.permute.default: lambda f, a, k: _view(a[0], f, a, k, View.PERMUTE, *a[1]),
        aten.select.int: lambda f, a, k: _view(a[0], f, a, k, View.SELECT, *map(int, a[1:])),
        aten.unsqueeze.default: lambda f, a, k: _view(a[0], f, a, k, View.UNSQUEEZE, a[1]),
        aten.slice.Tensor: _aten_slice,
        aten.split.Tensor: _aten_split,
        aten.split_with_sizes.default: _aten_split,
        aten.view.default: _aten_reshape,
        aten._unsafe_view.default: _aten_reshape,
        aten.squeeze.default: _aten_squeeze,
        aten.squeeze.dim: _aten_squeeze,
        aten.squeeze.dims: _aten_squeeze,
        aten.expand.default: _aten_expand,
        aten.detach.default: _aten_alias,
        aten.alias.default: _aten_alias,
        aten.lift_fresh.default: _aten_alias,
        aten.clone.default: _aten_clone,
        aten._to_copy.default: _aten_to_copy,
        aten.copy_.default: _aten_copy_,
        aten.zeros_like.default: _aten_like,
        aten.ones_like.default: _aten_like,
        aten.empty_like.default: _aten_like,
        aten.full_like.default: _aten_like,
        aten.rand_like.default: _aten_like,
        aten.randn_like.default: _aten_like,
        aten.new_empty.default: _aten_new,
        aten.new_zeros.default: _aten_new,
        aten.new_ones.default: _aten_new,
        aten.new_full.default: _aten_new,
    }
)

READS.update(
    {
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.mean.default,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        aten.max.default,
        aten.min.default,
        aten.var.correction,
        aten.std.correction,
        aten.norm.ScalarOpt_dim,
        aten.linalg_vector_norm.default,
        aten._linalg_svd.default,
        aten.linalg_qr.default,
        aten.svd.default if hasattr(aten.svd, "default") else aten._linalg_svd.default,
        aten.cat.default,
        aten.stack.default,
        aten.index_select.default,
        aten.index.Tensor,
        aten.gather.default,
        aten.index_copy.default,
        aten.scatter_add.default,
        aten.all.default,
        aten.any.default,
        aten.equal.default,
        aten._local_scalar_dense.default,
        aten._weight_norm_interface.default,
        aten.argsort.default,
        aten.sort.default,
        aten.topk.default,
        aten.argmax.default,
        aten.argmin.default,
        aten.triu.default,
        aten.tril.default,
        aten.repeat.default,
        aten.constant_pad_nd.default,
    }
)
