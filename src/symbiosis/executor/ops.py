"""The closed list of operations: what each accepts and how it is computed.

`check` looks at shapes and dtypes only, so that a bad exchange is refused before memory is
allocated for it; `run` computes. What is not here, the executor does not do. Knows tensors;
knows nothing of clients, queues or sockets.

Shapes: T rows, I in, O out, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from symbiosis.errors import InvalidInput, ProtocolError
from symbiosis.executor import chain, ring
from symbiosis.executor.weights import Weights
from symbiosis.kernels import MANY_ROWS, Kernels, Product
from symbiosis.wire.exchange import NO_BIAS, RING_OPS, Exchange, Op
from symbiosis.wire.tensors import ITEM_BYTES, MAX_DIMS, MOST_IN_DIM
from symbiosis.wire.views import MOST_COPIED

_INTEGERS = (torch.int64, torch.int32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_CONVOLUTIONS = (Op.CONVOLUTION, Op.CONVOLUTION_INPUT_GRAD)

_WITHOUT_PARAMS = (Op.LINEAR, Op.MATMUL, Op.GROUPED_MATMUL, Op.EMBEDDING)

_MOST_ELEMENTS = 1 << 48  # counting dimensions of 0 as 1, so that strides cannot overflow


class Plan(NamedTuple):
    """What `check` found out about an exchange."""

    rows: int
    result_bytes: int
    joinable: bool  # may be computed together with others on the same weight
    lookups: tuple[tuple[int, int], ...] = ()  # (tensor that holds token ids, rows they index)


def check(exchange: Exchange, weights: Weights) -> Plan:
    """Validate ``exchange`` against the model's table, without its payload.

    Raises UnknownWeight, InvalidInput, ProtocolError (malformed recipe or parameters).
    """
    if exchange.op is Op.CHAIN:
        return _check_chain(exchange, weights)
    if exchange.op in RING_OPS:
        _check_sizes(exchange)
        return Plan(*ring.check(exchange, weights), exchange.op is not Op.RING_MASK)
    _check_tensors(exchange)
    _check_params(exchange)
    views = [weights.like(weight, exchange.recipe) for weight in exchange.weights]
    shapes = [_result_shape(exchange, view) for view in views]
    for weight, view, shape in zip(exchange.weights, views, shapes, strict=True):
        _check_result(exchange, shape)
        _check_copy(exchange, weights[weight].tensor, view)
    for bias, shape in zip(exchange.biases, shapes, strict=True):
        if bias != NO_BIAS:
            _check_bias(exchange, weights, bias, shape)
    spec = exchange.specs[0]
    item = ITEM_BYTES[weights.dtype if exchange.op is Op.EMBEDDING else spec.dtype]
    joinable = exchange.op in (Op.LINEAR, Op.MATMUL, Op.EMBEDDING)
    rows = math.prod(spec.shape if exchange.op is Op.EMBEDDING else spec.shape[:-1])
    lookups = ((0, min(view.shape[0] for view in views)),) if exchange.op is Op.EMBEDDING else ()
    return Plan(rows, sum(item * math.prod(shape) for shape in shapes), joinable, lookups)


def _check_chain(exchange: Exchange, weights: Weights) -> Plan:
    _check_sizes(exchange)
    values_bytes = chain.check(exchange, weights)
    rows, lookups = chain.rows_of(exchange.specs[0]), chain.lookups(exchange, weights)
    return Plan(rows, values_bytes, joinable=True, lookups=lookups)


def run(
    exchange: Exchange,
    weights: Weights,
    inputs: tuple[torch.Tensor, ...],
    kernels: Kernels | None = None,
) -> list[torch.Tensor]:
    """Compute ``exchange`` on ``inputs`` (its own tensors, or several clients' rows joined), its
    products by ``kernels``, which are those for one client by default.

    One tensor per weight, in the input's dtype (the weight's for an embedding), contiguous; of
    a chain, one tensor with its outputs side by side.
    """
    kernels = kernels or weights.for_one
    if exchange.op is Op.CHAIN:
        return chain.run(exchange, weights, inputs, kernels)
    if exchange.op in RING_OPS:
        return ring.run(exchange, weights, inputs)
    results = []
    for number, (weight, bias_id) in enumerate(zip(exchange.weights, exchange.biases, strict=True)):
        w, bias = weights.view(weight, exchange.recipe), _bias(weights, bias_id)
        y = _run_in_place(exchange, number, w, bias, inputs[0], kernels)
        results.append(_run_one(exchange, w, bias, inputs, kernels) if y is None else y)
    return results


def check_values(exchange: Exchange, plan: Plan) -> None:
    """Values that would make a kernel read out of bounds; raises InvalidInput."""
    for tensor, size in plan.lookups:
        _check_ids(exchange.tensors[tensor], size)
    if exchange.op is Op.GROUPED_MATMUL:
        rows = exchange.specs[0].shape[0]
        offsets = exchange.tensors[1].tolist()
        rise = all(a <= b for a, b in zip([0, *offsets], offsets, strict=False))
        if not rise or offsets[-1] != rows:  # rows of no expert would not be computed
            raise InvalidInput(f"expert offsets {offsets} do not rise to {rows} rows")


def _check_ids(ids: torch.Tensor, size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
        offender = int(ids[(ids < 0) | (ids >= size)][0])
        raise InvalidInput(f"token id {offender} is outside the embedding's {size} rows")


def _bias(weights: Weights, bias: int) -> torch.Tensor | None:
    return None if bias == NO_BIAS else weights.vector(bias)


def _check_bias(
    exchange: Exchange, weights: Weights, bias: int, result_shape: tuple[int, ...]
) -> None:
    if exchange.op not in (Op.LINEAR, Op.MATMUL, Op.CONVOLUTION):
        raise InvalidInput(f"{exchange.op.name.lower()} takes no bias")
    last = exchange.op is not Op.CONVOLUTION or _channels_last(exchange.params)
    channels = -1 if last else 1
    if weights.vector(bias).shape[0] != result_shape[channels]:
        raise InvalidInput(f"bias {bias} does not fit a result of shape {list(result_shape)}")


def _check_params(exchange: Exchange) -> None:
    """None where an operation takes none: they are part of what exchanges are joined and remembered
    by. Raises ProtocolError."""
    if exchange.params and exchange.op in _WITHOUT_PARAMS:
        raise ProtocolError(f"{exchange.op.name.lower()} takes no parameters")


def _check_result(exchange: Exchange, shape: tuple[int, ...]) -> None:
    if len(shape) > MAX_DIMS or any(dim > MOST_IN_DIM for dim in shape):
        raise InvalidInput(
            f"{exchange.op.name.lower()} of input {exchange.specs[0]} has a result of shape "
            f"{list(shape)}, which cannot travel: {MAX_DIMS} dimensions of {MOST_IN_DIM} at most"
        )


def _check_copy(exchange: Exchange, weight: torch.Tensor, view: torch.Tensor) -> None:
    """A kernel copies an operand whose rows and columns both have gaps, or lie on one another: not
    more of it than `View.CONTIGUOUS` may."""
    if view.numel() <= max(weight.numel(), MOST_COPIED):
        return
    if exchange.op in _CONVOLUTIONS or 1 not in view.stride()[-2:]:
        raise InvalidInput(
            f"{exchange.op.name.lower()} on a view of {list(view.shape)} would copy a weight of "
            f"{list(weight.shape)}, {view.numel()} elements; at most {MOST_COPIED}"
        )


def _check_sizes(exchange: Exchange) -> None:
    for spec in exchange.specs:
        if math.prod(max(dim, 1) for dim in spec.shape) > _MOST_ELEMENTS:
            raise InvalidInput(f"a tensor of {spec} is beyond any memory")


def _check_tensors(exchange: Exchange) -> None:
    _check_sizes(exchange)
    expected = 2 if exchange.op is Op.GROUPED_MATMUL else 1
    if len(exchange.specs) != expected:
        raise InvalidInput(
            f"{exchange.op.name.lower()} takes {expected} tensors, not {len(exchange.specs)}"
        )
    allowed = _INTEGERS if exchange.op is Op.EMBEDDING else _FLOATS
    if exchange.specs[0].dtype not in allowed:
        raise InvalidInput(
            f"{exchange.op.name.lower()} takes {' or '.join(str(d) for d in allowed)}, "
            f"not {exchange.specs[0].dtype}"
        )
    if expected == 2 and exchange.specs[1].dtype is not torch.int32:
        raise InvalidInput(f"expert offsets must be int32, not {exchange.specs[1].dtype}")


def _result_shape(exchange: Exchange, view: torch.Tensor) -> tuple[int, ...]:
    x, w = exchange.specs[0], tuple(view.shape)
    match exchange.op:
        case Op.LINEAR if len(w) == 2 and x.shape[-1:] == (w[1],):
            return (*x.shape[:-1], w[0])
        case Op.MATMUL if len(w) == 2 and x.shape[-1:] == (w[0],):
            return (*x.shape[:-1], w[1])
        case Op.BATCHED_MATMUL if len(w) == 3 == len(x.shape):
            inner, rows = x.shape[:-3:-1] if not _flipped(exchange) else x.shape[-2:]
            if (x.shape[0], inner) == w[:2]:
                return (w[0], rows, w[2])
        case Op.GROUPED_MATMUL if len(w) == 3 and len(x.shape) == 2 and x.shape[1] == w[1]:
            if exchange.specs[1].shape == (w[0],):
                return (x.shape[0], w[2])
        case Op.WEIGHT_MATMUL if len(w) == len(x.shape) in (2, 3):
            inner, columns = x.shape[-2:] if not _flipped(exchange) else x.shape[:-3:-1]
            if (*x.shape[:-2], inner) == (*w[:-2], w[-1]):
                return (*w[:-1], columns)
        case Op.EMBEDDING if len(w) == 2:
            return (*x.shape, w[1])
        case Op.CONVOLUTION | Op.CONVOLUTION_INPUT_GRAD:
            return _convolution_shape(exchange, view)
    raise InvalidInput(
        f"{exchange.op.name.lower()} of input {x} does not fit a weight of shape {list(w)}"
    )


def _flipped(exchange: Exchange) -> bool:
    """Is the input of a BATCHED_MATMUL or WEIGHT_MATMUL to be read transposed?"""
    if exchange.params not in ((), (1,)):
        raise ProtocolError(f"{exchange.op.name.lower()} takes no parameter but 1: x is transposed")
    return exchange.params == (1,)


class ConvolutionParams(NamedTuple):
    """``torch.convolution``'s arguments for n spatial dimensions. On the wire: n, stride × n,
    padding × n, dilation × n, flags, output_padding × n, groups. Flags: 1 transposed, 2 channels
    last (see `_channels_last`)."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def _convolution_params(params: tuple[int, ...]) -> tuple[ConvolutionParams, tuple[int, ...]]:
    """The parameters, and what follows them (an input gradient's input shape)."""
    n = params[0] if params else 0
    if not 1 <= n <= 3 or len(params) < 4 * n + 3:
        raise ProtocolError("a convolution's parameters are malformed")
    stride, padding, dilation = (list(params[1 + i * n : 1 + (i + 1) * n]) for i in range(3))
    transposed = bool(params[1 + 3 * n] & 1)
    output_padding = list(params[2 + 3 * n : 2 + 4 * n])
    groups = params[2 + 4 * n]
    convolution = ConvolutionParams(stride, padding, dilation, transposed, output_padding, groups)
    return convolution, params[3 + 4 * n :]


def _channels_last(params: tuple[int, ...]) -> bool:
    """Are input and result sent as (N, ..., C)? As the client's own tensor lay in memory, for
    torch chooses the kernel by it, and the last bits differ between kernels."""
    return bool(params[1 + 3 * params[0]] & 2)


def _channels_second(shape: tuple[int, ...], params: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1]) if _channels_last(params) else shape


def _convolution_shape(exchange: Exchange, view: torch.Tensor) -> tuple[int, ...]:
    """torch's own shape rules, on the meta device: nothing is computed or allocated."""
    x, w = exchange.specs[0], view.to("meta")
    params, input_shape = _convolution_params(exchange.params)
    if len(x.shape) != len(params.stride) + 2:
        raise InvalidInput(f"convolution of {x} with {params}")
    sent = _channels_second(x.shape, exchange.params)
    forward = exchange.op is Op.CONVOLUTION
    shape = sent if forward else input_shape
    _check_convolution(params, shape, tuple(w.shape))
    try:
        out = tuple(_convolution(w.new_empty(shape), w, None, params).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InvalidInput(f"convolution of input {x}: {error}") from None
    if not forward and out != sent:
        raise InvalidInput(f"a gradient of shape {list(sent)} for an output {list(out)}")
    result = out if forward else input_shape
    if _channels_last(exchange.params):
        return (result[0], *result[2:], result[1])
    return result


def _check_convolution(
    params: ConvolutionParams, shape: tuple[int, ...], w: tuple[int, ...]
) -> None:
    """What torch's shape rules leave to the kernel, or answer by dividing by zero."""
    dims = len(params.stride) + 2
    positive = min(*params.stride, *params.dilation, params.groups) > 0
    least = min(*params.padding, *params.output_padding) >= 0
    padded = any(params.output_padding) and not params.transposed
    if len(shape) != dims or len(w) != dims or not positive or not least or padded:
        raise InvalidInput(f"convolution of {list(shape)} with {list(w)} and {params}")
    channels = w[0] if params.transposed else w[1] * params.groups
    if shape[1] != channels or w[0] % params.groups or min(shape[1:]) < 1:
        raise InvalidInput(
            f"convolution of {list(shape)}: a weight of {list(w)} in {params.groups} groups "
            f"takes {channels} channels"
        )


def _convolved(
    exchange: Exchange, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    last = _channels_last(exchange.params)
    x = x.movedim(-1, 1) if last else x
    if exchange.op is Op.CONVOLUTION:
        y = _convolution(x, w, bias, _convolution_params(exchange.params)[0])
    else:
        y = _convolution_input_grad(x, w, exchange.params)
    return y.movedim(1, -1) if last else y


def _convolution(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, params: ConvolutionParams
) -> torch.Tensor:
    return torch.convolution(x, w, bias, *params)


def _convolution_input_grad(
    dy: torch.Tensor, w: torch.Tensor, params: tuple[int, ...]
) -> torch.Tensor:
    conv, input_shape = _convolution_params(params)
    if _channels_last(params):
        no_input = dy.new_empty((input_shape[0], *input_shape[2:], input_shape[1])).movedim(-1, 1)
    else:
        no_input = dy.new_empty(()).expand(input_shape)
    grads = torch.ops.aten.convolution_backward(dy, no_input, w, None, *conv, [True, False, False])
    return grads[0]  # type: ignore[no-any-return]


def _run_in_place(
    exchange: Exchange,
    number: int,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    kernels: Kernels,
) -> torch.Tensor | None:
    """A product computed where its client wants it, by the kernel that computes it elsewhere.
    oneDNN's makes its result itself, which of many rows is not worth the copy."""
    if exchange.place is None or exchange.op not in (Op.LINEAR, Op.MATMUL):
        return None
    if not (x.is_cpu and w.is_cpu and x.dtype is w.dtype is torch.float32):
        return None
    product = Product.LINEAR if exchange.op is Op.LINEAR else Product.MATMUL
    if kernels.is_onednn(product, x, w) and x.numel() < MANY_ROWS * x.shape[-1]:
        return None
    matrix = w.t() if exchange.op is Op.LINEAR else w
    y = exchange.place(number, x.dtype, (*x.shape[:-1], matrix.shape[1]))
    if y is None:
        return None
    rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)
    return y


def _run_one(
    exchange: Exchange,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    inputs: tuple[torch.Tensor, ...],
    kernels: Kernels,
) -> torch.Tensor:
    x = inputs[0].to(w.device, non_blocking=True)
    if exchange.op is Op.EMBEDDING:
        return F.embedding(x, w)
    dtype = x.dtype
    x = x.to(w.dtype)
    match exchange.op:
        case Op.LINEAR:
            y = kernels.linear(x, w, bias)
        case Op.MATMUL:
            y = kernels.matmul(x, w, bias)
        case Op.BATCHED_MATMUL:
            y = torch.bmm(x.transpose(1, 2) if _flipped(exchange) else x, w)
        case Op.WEIGHT_MATMUL:
            y = torch.matmul(w, x.transpose(-2, -1) if _flipped(exchange) else x)
        case Op.GROUPED_MATMUL:
            y = F.grouped_mm(x, w, offs=inputs[1].to(w.device))
        case Op.CONVOLUTION | Op.CONVOLUTION_INPUT_GRAD:
            y = _convolved(exchange, x, w, bias)
    return y.to(dtype).contiguous()
