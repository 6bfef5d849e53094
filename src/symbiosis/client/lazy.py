"""Views, casts and reads of a remote weight: what becomes a recipe, and what fetches.

Views and casts stay lazy. New tensors "like" a weight are ordinary local ones. Reads need the
numbers: the weight is fetched, once per session, and the operation runs locally. Fills the tables
of `symbiosis.client.remote_weight`; products are in `symbiosis.client.operations`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symbiosis.client.remote_weight import ATEN, FUNCTIONS, READS, RemoteWeight, asker
from symbiosis.wire.views import View

aten = torch.ops.aten


def _view(weight: RemoteWeight, func: Any, args: Any, kwargs: Any, step: View, *ints: int) -> Any:
    return weight.viewed(func(weight._like, *args[1:], **kwargs), step, *ints)


def _aten_t(func: Any, args: Any, kwargs: Any) -> Any:
    if args[0].dim() < 2:
        return _aten_alias(func, args, kwargs)
    return _view(args[0], func, args, kwargs, View.TRANSPOSE, 0, 1)


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


def _aten_expand(func: Any, args: Any, kwargs: Any) -> Any:
    like = func(args[0]._like, *args[1:], **kwargs)
    return args[0].viewed(like, View.EXPAND, *like.shape)


def _aten_alias(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].cast(args[0].dtype, args[0].device)


def _aten_clone(func: Any, args: Any, kwargs: Any) -> Any:
    """A frozen weight never changes, so that its clone is the weight; only strides may differ."""
    like = func(args[0]._like, *args[1:], **kwargs)
    if like.stride() == args[0]._like.stride():
        return args[0].copied()
    return args[0].viewed(like, View.CONTIGUOUS)._owned()


def _aten_to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    """Among floating dtypes a cast stays lazy; any other changes the numbers for good."""
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    device = torch.device(kwargs.get("device") or weight.device)
    if not dtype.is_floating_point:
        return weight._numbers(f"a cast to {dtype}{asker()}").to(device, dtype)
    return weight.cast(dtype, device)._owned()


def _aten_copy_(func: Any, args: Any, kwargs: Any) -> Any:
    """Copying the numbers out reads them; copying into a frozen weight is refused."""
    target, source = args[:2]
    if isinstance(target, RemoteWeight):
        return NotImplemented
    return func(target, source._numbers(f"copy_{asker()}"), *args[2:])


def _aten_set_(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.nn.utils.parametrize`` sets each parameter to itself; anything else is refused."""
    target, source = args
    both = isinstance(target, RemoteWeight) and isinstance(source, RemoteWeight)
    return target if both and target.is_same_view(source) else NotImplemented


def _aten_like(func: Any, args: Any, kwargs: Any) -> Any:
    """``zeros_like``, ``randn_like``, ...: an ordinary local tensor."""
    weight = args[0]
    kwargs = {**kwargs, "device": kwargs.get("device") or weight.device}
    if kwargs["device"] == torch.device("meta"):
        return func(weight._like, *args[1:], **kwargs)
    like = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return func(like, *args[1:], **{**kwargs, "memory_format": torch.contiguous_format})


def _aten_new(func: Any, args: Any, kwargs: Any) -> Any:
    plain = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
    return func(plain, *args[1:], **kwargs)


def _numpy(weight: Any, **kwargs: Any) -> Any:
    if type(weight) is not RemoteWeight:
        return NotImplemented
    return weight.fetch("numpy").numpy(**kwargs)


def _tolist(weight: Any) -> Any:
    if type(weight) is not RemoteWeight:
        return NotImplemented
    return weight.fetch("tolist").tolist()


FUNCTIONS.update(
    {
        torch.Tensor.numpy: _numpy,
        torch.Tensor.tolist: _tolist,
    }
)

ATEN.update(
    {
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
        aten.squeeze.default: _aten_reshape,
        aten.squeeze.dim: _aten_reshape,
        aten.squeeze.dims: _aten_reshape,
        aten.expand.default: _aten_expand,
        aten.detach.default: _aten_alias,
        aten.alias.default: _aten_alias,
        aten.lift_fresh.default: _aten_alias,
        aten.clone.default: _aten_clone,
        aten._to_copy.default: _aten_to_copy,
        aten.copy_.default: _aten_copy_,
        aten.set_.source_Tensor: _aten_set_,
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
        aten.mm.default,  # of two weights; with a weight as the addend
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
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
        aten._linalg_solve_ex.default,
        aten._linalg_eigh.default,
        aten.linalg_inv_ex.default,
        aten.linalg_cholesky_ex.default,
        aten.linalg_lu_factor_ex.default,
        aten.masked_select.default,
        aten.nonzero.default,
        aten.kthvalue.default,
        aten.median.default,
        aten.median.dim,
        aten.cumsum.default,
        aten.aminmax.default,
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
        aten.addmm.default,  # where the weight is what a product is added to
        aten.baddbmm.default,
    }
)

FUNCTIONS.update(
    {
        Tensor.data_ptr: lambda weight: weight.memory().data_ptr(),
        Tensor.storage: lambda weight: weight.memory().storage(),
        Tensor.untyped_storage: lambda weight: weight.memory().untyped_storage(),
    }
)
