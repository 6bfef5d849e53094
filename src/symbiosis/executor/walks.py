"""Chains that stop at their products, where other clients' requests can join them.

Decoders with different adapters ask for different chains, or for plain products, and all go
through the same frozen weights in the same order. So while several clients decode, a chain is a
`Walk`: for the scheduler, each product on the way is a request of its own, and whoever waits for
the same one shares it, so that the weight is read once. Those who walk the same chain from its
first product on are a lane and do the arithmetic between products together, too.

Knows tensors and weights; knows nothing of clients or time. Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from symbiosis.executor import batch, ops
from symbiosis.executor.chain import as_rows, compute_step
from symbiosis.executor.few_rows import linear as linear_of_joined
from symbiosis.executor.weights import Weights
from symbiosis.wire.chain import Instruction, Step, unpack_chain
from symbiosis.wire.exchange import Exchange, Op
from symbiosis.wire.tensors import spec_of

_numbers = itertools.count(1)

_OP_OF = {Step.LINEAR: Op.LINEAR, Step.MATMUL: Op.MATMUL, Step.EMBEDDING: Op.EMBEDDING}


class Walk:
    """One client's chain on its way, from product to product."""

    def __init__(self, exchange: Exchange, weights: Weights, arrived_s: float) -> None:
        """``exchange`` is checked, and `begins_with_product`."""
        self.exchange = exchange
        self.arrived_s = arrived_s
        self.elapsed_s = 0.0  # in batches
        self._members: list[int] = []  # how many walked along, at each product so far
        self.number = next(_numbers)
        values = tuple(as_rows(x) for x in exchange.tensors)
        self.lane = _Lane(exchange, weights, (self.number,), (len(values[0]),), values)

    @property
    def key(self) -> Hashable:
        """What it waits for: the `batch.key` of the same products asked for plainly."""
        return batch.key(self.lane.asked, True, 0)

    @property
    def mean_batch(self) -> float:
        """Requests per product, over those computed."""
        return sum(self._members) / len(self._members)

    def walked(self, members: int, elapsed_s: float) -> None:
        """A product was computed for so many requests at once."""
        self._members.append(members)
        self.elapsed_s += elapsed_s


def begins_with_product(exchange: Exchange) -> bool:
    """Can a checked CHAIN wait for its first product from the start?"""
    return unpack_chain(exchange.params).steps[0].step in _OP_OF


def compute(
    members: Sequence[Exchange | Walk], weights: Weights
) -> list[tuple[torch.Tensor, ...] | None]:
    """One exchange's products for all ``members``, who have the same key.

    The results of each: as `batch.compute` of a plain exchange and of a chain that has come to its
    end; None of a chain that goes on. If it raises, no chain has moved.
    """
    plain = [member for member in members if isinstance(member, Exchange)]
    walks = {member.number: member for member in members if isinstance(member, Walk)}
    if not walks:
        return list(batch.compute(plain, weights))
    lanes = _lanes(walks)
    asked = lanes[0].asked
    rows = (*(lane.asked.tensors[0] for lane in lanes), *(as_rows(e.tensors[0]) for e in plain))
    linear = F.linear if len(members) == 1 else linear_of_joined
    sizes = [len(x) for x in rows]
    joined = batch.cat(rows, weights.device)
    outputs = [torch.split(y, sizes) for y in ops.run(asked, weights, (joined,), linear)]
    parts = list(zip(*outputs, strict=True))
    moved = [lane.after(part) for lane, part in zip(lanes, parts, strict=False)]
    done: dict[int, torch.Tensor] = {}
    for lane in moved:
        done.update(zip(lane.walks, lane.results(), strict=False))
    answers = iter(parts[len(lanes) :])
    found: list[tuple[torch.Tensor, ...] | None] = []
    for member in members:
        if isinstance(member, Exchange):
            found.append(tuple(batch.shaped(y, member) for y in next(answers)))
        else:
            found.append((done[member.number],) if member.number in done else None)
    for lane in moved:  # nothing can fail any more
        for number in lane.walks:
            walks[number].lane = lane
    return found


class _Stop(NamedTuple):
    """Products of one value, which a client without a chain asks for at once, and the arithmetic
    between them and the next ones."""

    op: Op
    numbers: tuple[int, ...]  # of the weights, in the exchange
    source: int  # the value that is multiplied
    then: tuple[Instruction, ...]


@functools.lru_cache(maxsize=4096)
def _stops(params: tuple[int, ...]) -> tuple[_Stop, ...]:
    """The stops of a chain that begins with a product."""
    stops: list[_Stop] = []
    for step in unpack_chain(params).steps:
        last = stops[-1] if stops else None
        op = _OP_OF.get(step.step)
        if op is None:
            assert last is not None
            stops[-1] = last._replace(then=(*last.then, step))
        elif last and not last.then and (last.op, last.source) == (op, step.a):
            stops[-1] = last._replace(numbers=(*last.numbers, step.b))
        else:
            stops.append(_Stop(op, (step.b,), step.a, ()))
    return tuple(stops)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lane:
    """Walks of one chain that have come equally far, their rows joined."""

    exchange: Exchange
    weights: Weights
    walks: tuple[int, ...]  # their numbers; a walk knows its lane, so that both are freed at once
    sizes: tuple[int, ...]  # rows of each walk
    values: tuple[torch.Tensor, ...]  # (T, width) or, as shipped vectors, (width,)
    at: int = 0  # stop

    @functools.cached_property
    def asked(self) -> Exchange:
        """Its next products as a plain exchange, for the rows of all walks."""
        stop = self._stops[self.at]
        x = self.values[stop.source]
        weights = tuple(self.exchange.weights[number] for number in stop.numbers)
        biases = tuple(self.exchange.biases[number] for number in stop.numbers)
        return Exchange(
            stop.op, weights, biases, (), (), (spec_of(x),), (x,), self.exchange.priority
        )

    def after(self, products: tuple[torch.Tensor, ...]) -> _Lane:
        """Where it is once its products are computed: at the next stop, or at the end."""
        values = [*self.values, *products]
        for step in self._stops[self.at].then:
            values.append(compute_step(step, values, self.exchange, self.weights))
        return dataclasses.replace(self, values=tuple(values), at=self.at + 1)

    def results(self) -> tuple[torch.Tensor, ...]:
        """At the end of the chain, of each walk its rows of the outputs; before, nothing."""
        if self.at < len(self._stops):
            return ()
        outputs = unpack_chain(self.exchange.params).outputs
        joined = torch.cat([self.values[output] for output in outputs], 1)
        return torch.split(joined, list(self.sizes))

    def split(self) -> list[_Lane]:
        """One lane for each walk."""
        columns = [
            (value,) * len(self.sizes)
            if self._is_vector(number)
            else torch.split(value, list(self.sizes))
            for number, value in enumerate(self.values)
        ]
        return [
            dataclasses.replace(self, walks=(walk,), sizes=(size,), values=values)
            for walk, size, values in zip(
                self.walks, self.sizes, zip(*columns, strict=True), strict=True
            )
        ]

    @property
    def start(self) -> Hashable:
        """Equal for lanes that are all at the start of one chain, and so can be joined."""
        exchange = self.exchange
        program = (exchange.weights, exchange.biases, exchange.params)
        return id(self) if self.at else (program, *(value.dtype for value in self.values))

    @property
    def _stops(self) -> tuple[_Stop, ...]:
        return _stops(self.exchange.params)

    def _is_vector(self, number: int) -> bool:
        return number >= len(self.exchange.tensors) and self.values[number].dim() == 1


def _joined(lanes: list[_Lane]) -> _Lane:
    """One lane of those with the same `start`."""
    first, *_ = lanes
    if first.at:
        return first
    device = first.weights.device
    columns = zip(*(lane.values for lane in lanes), strict=True)
    return dataclasses.replace(
        first,
        walks=tuple(walk for lane in lanes for walk in lane.walks),
        sizes=tuple(size for lane in lanes for size in lane.sizes),
        values=tuple(batch.cat(column, device).to(device) for column in columns),
    )


def _lanes(walks: dict[int, Walk]) -> list[_Lane]:
    """The lanes of ``walks`` (by number) and of nobody else, as few as possible."""
    starts: dict[Hashable, list[_Lane]] = {}
    for lane in {id(walk.lane): walk.lane for walk in walks.values()}.values():
        whole = all(number in walks for number in lane.walks)
        for part in [lane] if whole else lane.split():
            if part.walks[0] in walks:
                starts.setdefault(part.start, []).append(part)
    return [_joined(lanes) for lanes in starts.values()]
