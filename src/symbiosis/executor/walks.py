"""Chains that stop at their products, where other clients' requests can join them.

Decoders with different adapters ask for different chains, or for plain products, and all go
through the same frozen weights in the same order. So while others decode who ask otherwise, a
chain is a `Walk`: for the scheduler, each product on the way is a request of its own, and whoever
waits for the same one shares it, so that the weight is read once. Those who walk the same chain
from its first product on are a lane and do the arithmetic between products together, too.

Knows tensors and weights; knows nothing of clients or time. Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from symbiosis.executor import batch
from symbiosis.executor.chain import as_rows, compute_step
from symbiosis.executor.weights import Weights
from symbiosis.wire.chain import PRODUCTS, Instruction, unpack_chain
from symbiosis.wire.exchange import Exchange, Op
from symbiosis.wire.tensors import spec_of

_MOST_CHAINS = 256  # that are remembered of a client

_numbers = itertools.count(1)

_OP_OF = {step: op for op, step in PRODUCTS.items()}


class Walk:
    """One client's chain on its way, from product to product."""

    def __init__(self, exchange: Exchange, arrived_s: float) -> None:
        """``exchange`` is checked, and `begins_with_product`."""
        self.exchange = exchange
        self.arrived_s = arrived_s
        self.elapsed_s = 0.0  # in batches
        self._batches = self._members = 0
        self.number = next(_numbers)
        values = tuple(as_rows(x) for x in exchange.tensors)
        stops = _stops(exchange.weights, exchange.biases, exchange.params)
        self.lane = _Lane(exchange, stops, (self.number,), (len(values[0]),), values)

    @property
    def key(self) -> Hashable:
        """What it waits for: the `batch.key` of the same products asked for plainly."""
        return self.lane.key

    @property
    def mean_batch(self) -> float:
        """Requests per batch that it was in."""
        return self._members / self._batches

    def walked(self, members: int, elapsed_s: float) -> None:
        """It was in a batch of so many requests."""
        self._batches += 1
        self._members += members
        self.elapsed_s += elapsed_s


class Company:
    """Which chains each client asks for: those whose company asks for the same need no stops."""

    def __init__(self) -> None:
        self._asked: dict[int, dict[Hashable, None]] = {}  # by client, the latest last

    def alike(self, client: int, chain: Hashable, others: list[int]) -> bool:
        """``client`` asks for ``chain``; has each of the ``others`` done so lately?"""
        mine = self._asked.setdefault(client, {})
        mine.pop(chain, None)
        mine[chain] = None
        if len(mine) > _MOST_CHAINS:
            del mine[next(iter(mine))]
        return all(chain in self._asked.get(other, ()) for other in others)

    def left(self, client: int) -> None:
        self._asked.pop(client, None)


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
    kernels = weights.for_one if len(members) == 1 else weights.for_joined
    lanes = _lanes(walks, weights.device)
    products = batch.compute([*(lane.asked for lane in lanes), *plain], weights, kernels)
    lanes = [lane.after(y, weights) for lane, y in zip(lanes, products, strict=False)]
    answers = iter(products[len(lanes) :])
    results: dict[int, tuple[torch.Tensor, ...]] = {}
    for lane in lanes:
        results.update(lane.results())
    for lane in lanes:  # nothing can fail any more
        for number in lane.walks:
            walks[number].lane = lane
    return [
        next(answers) if isinstance(member, Exchange) else results.get(member.number)
        for member in members
    ]


class _Stop(NamedTuple):
    """Products of one value, which a client without a chain asks for at once, and the arithmetic
    between them and the next ones."""

    op: Op
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    source: int  # the value that is multiplied
    then: tuple[Instruction, ...] = ()


@functools.lru_cache(maxsize=4096)
def _stops(
    weights: tuple[int, ...], biases: tuple[int, ...], params: tuple[int, ...]
) -> tuple[_Stop, ...]:
    """The stops of a chain that begins with a product."""
    stops: list[_Stop] = []
    for step in unpack_chain(params).steps:
        op = _OP_OF.get(step.step)
        if op is None:
            stops[-1] = stops[-1]._replace(then=(*stops[-1].then, step))
            continue
        stop = _Stop(op, (weights[step.b],), (biases[step.b],), step.a)
        if stops and not stops[-1].then and (stops[-1].op, stops[-1].source) == (op, step.a):
            last = stops.pop()
            stop = _Stop(op, last.weights + stop.weights, last.biases + stop.biases, step.a)
        stops.append(stop)
    return tuple(stops)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lane:
    """Walks of one chain that have come equally far, their rows joined."""

    exchange: Exchange
    stops: tuple[_Stop, ...]  # of the whole chain
    walks: tuple[int, ...]  # their numbers; a walk knows its lane, so that both are freed at once
    sizes: tuple[int, ...]  # rows of each walk
    values: tuple[torch.Tensor, ...]  # (T, width) or, as shipped vectors, (width,)
    at: int = 0  # stop

    @functools.cached_property
    def asked(self) -> Exchange:
        """Its next products as a plain exchange, for the rows of all walks."""
        op, weights, biases, source, _ = self.stops[self.at]
        x = self.values[source]
        return Exchange(op, weights, biases, (), (), (spec_of(x),), (x,), self.exchange.priority)

    @functools.cached_property
    def key(self) -> Hashable:
        return batch.key(self.asked, True, 0)

    def after(self, products: tuple[torch.Tensor, ...], weights: Weights) -> _Lane:
        """Where it is once its products are computed: at the next stop, or at the end."""
        values = [*self.values, *products]
        for step in self.stops[self.at].then:
            values.append(compute_step(step, values, weights))
        return dataclasses.replace(self, values=tuple(values), at=self.at + 1)

    def results(self) -> dict[int, tuple[torch.Tensor, ...]]:
        """At the end of the chain, by walk, its rows of the outputs; before, nothing."""
        if self.at < len(self.stops):
            return {}
        outputs = unpack_chain(self.exchange.params).outputs
        joined = torch.cat([self.values[output] for output in outputs], 1)
        parts = torch.split(joined, list(self.sizes))
        return {walk: (part,) for walk, part in zip(self.walks, parts, strict=True)}

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
        return id(self) if self.at else batch.key(self.exchange, True, 0)

    def _is_vector(self, number: int) -> bool:
        return number >= len(self.exchange.tensors) and self.values[number].dim() == 1


def _joined(lanes: list[_Lane], device: torch.device) -> _Lane:
    """One lane of those with the same `start`."""
    first, *_ = lanes
    if first.at:
        return first
    columns = zip(*(lane.values for lane in lanes), strict=True)
    return dataclasses.replace(
        first,
        walks=tuple(walk for lane in lanes for walk in lane.walks),
        sizes=tuple(size for lane in lanes for size in lane.sizes),
        values=tuple(batch.cat(column, device).to(device) for column in columns),
    )


def _lanes(walks: dict[int, Walk], device: torch.device) -> list[_Lane]:
    """The lanes of ``walks`` (by number) and of nobody else, as few as possible."""
    starts: dict[Hashable, list[_Lane]] = {}
    for lane in {id(walk.lane): walk.lane for walk in walks.values()}.values():
        whole = all(number in walks for number in lane.walks)
        for part in [lane] if whole else lane.split():
            if part.walks[0] in walks:
                starts.setdefault(part.start, []).append(part)
    return [_joined(lanes, device) for lanes in starts.values()]
