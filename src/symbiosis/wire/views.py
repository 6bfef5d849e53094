"""View recipes: how a weight is looked at before an operation, as a few integers.

Client and executor both follow them: the one to know the numbers it fetched, the other to know
the operand of an exchange. No step copies, but for `View.CONTIGUOUS`.
"""

from __future__ import annotations

import enum

import torch

from symbiosis.errors import ProtocolError

MOST_COPIED = 1 << 24
"""Elements. A product that broadcasts a weight over a batch copies it so often; this is how far."""

Recipe = tuple[int, ...]
"""Flat: for each step its `View`, the number of its arguments, the arguments."""


class View(enum.IntEnum):
    """The steps, named after torch's methods; arguments as torch takes them."""

    TRANSPOSE = 1  # dim0, dim1
    PERMUTE = 2  # *dims
    SELECT = 3  # dim, index
    SLICE = 4  # dim, start, end, step
    RESHAPE = 5  # *shape; must be possible as a view
    UNSQUEEZE = 6  # dim
    SQUEEZE = 7  # *dims
    EXPAND = 8  # *shape
    CONTIGUOUS = 9


def look(tensor: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """``tensor`` seen through ``recipe``.

    Raises ProtocolError if the recipe is malformed; IndexError, RuntimeError, TypeError or
    ValueError, as torch does, if it does not fit the tensor.
    """
    at, most = 0, max(tensor.numel(), MOST_COPIED)
    while at < len(recipe):
        if at + 2 > len(recipe) or recipe[at + 1] < 0 or at + 2 + recipe[at + 1] > len(recipe):
            raise ProtocolError("a view recipe is cut short")
        if recipe[at] not in View._value2member_map_:
            raise ProtocolError(f"a view recipe holds an unknown step: {recipe[at]}")
        end = at + 2 + recipe[at + 1]
        if recipe[at] == View.CONTIGUOUS and tensor.numel() > most:
            raise ValueError(f"a copy of {tensor.numel()} elements, more than {most}")
        tensor = _step(tensor, View(recipe[at]), recipe[at + 2 : end])
        at = end
    return tensor


def _step(tensor: torch.Tensor, step: View, args: tuple[int, ...]) -> torch.Tensor:
    match step:
        case View.TRANSPOSE:
            dim0, dim1 = args
            return tensor.transpose(dim0, dim1)
        case View.PERMUTE:
            return tensor.permute(args)
        case View.SELECT:
            dim, index = args
            return tensor.select(dim, index)
        case View.SLICE:
            dim, start, end, stride = args
            sliced: torch.Tensor = torch.ops.aten.slice.Tensor(tensor, dim, start, end, stride)
            return sliced
        case View.RESHAPE:
            return tensor.view(args)
        case View.UNSQUEEZE:
            (dim,) = args
            return tensor.unsqueeze(dim)
        case View.SQUEEZE:
            return tensor.squeeze(args)
        case View.EXPAND:
            return tensor.expand(args)
        case View.CONTIGUOUS:
            return tensor.contiguous()
