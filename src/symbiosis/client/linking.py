"""From a traced pass to chains: which products follow from earlier ones without the client.

A chain begins with a product whose input comes from outside (attention, an adapter, token ids).
A later product joins it when its input is arithmetic on results of this chain, on shipped
vectors, on values of earlier chains, and on what the client can compute beforehand. Values of
earlier chains are returned by the one and sent to the other (the residual stream), since the
executor keeps nothing; what an adapter adds to the chain's first product (its LoRA) is computed
when the chain is asked for, and sent along. Pure: nodes in, chains out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from symbiosis.client.trace import Call, Node
from symbiosis.wire.chain import MAX_STEPS, PRODUCTS, Chain, Instruction, Step, pack_chain
from symbiosis.wire.exchange import Op
from symbiosis.wire.views import Recipe

Member = tuple[Op, int, Recipe, int]
"""A product: operation, weight, recipe, bias."""

Start = tuple[Member, torch.Size, torch.dtype, torch.device]
"""What a chain begins with: its first product, and of what input."""

SENT = -1
"""In place of an output's index: the input that was sent."""


class Event(NamedTuple):
    """A product of the traced pass, and the nodes of its input and result."""

    start: Start
    input: int
    result: int

    @property
    def member(self) -> Member:
        return self.start[0]

    @property
    def rows(self) -> int:
        shape = self.start[1]
        return math.prod(shape if self.member[0] is Op.EMBEDDING else shape[:-1])


class Answer(NamedTuple):
    """Where in a chain's outputs a product is, and the input that it was computed for."""

    member: Member
    input: int  # or `SENT`
    result: int


class Ask(NamedTuple):
    """A chain as it is sent: the input of its first product, then further values."""

    weights: tuple[int, ...]
    biases: tuple[int, ...]
    params: tuple[int, ...]
    takes: tuple[int, ...]  # nodes that earlier chains of the pass returned, or from `calls`
    answers: tuple[Answer, ...]
    keeps: tuple[tuple[int, int], ...]  # (node, index of an output or `SENT`) for later chains
    copied: tuple[int, ...]  # outputs (or `SENT`) that the model holds and that are compared with
    widths: tuple[int, ...]  # of the outputs, which come side by side as one tensor
    sent: int  # the node of the input that is sent
    calls: tuple[tuple[int, Call], ...]  # nodes that the client computes from it, in order


def start_of(member: Member, x: Tensor) -> Start:
    """A chain that begins with ``member`` of ``x`` is asked for with such an input only."""
    return member, x.shape, x.dtype, x.device


def link(nodes: list[Node], events: list[Event], calls: Mapping[int, Call]) -> dict[Start, Ask]:
    """The chains of a pass, by what they begin with. A product that neither begins nor joins one is
    in none. ``calls``: how the client computed nodes that have no step."""
    lost = _lost(nodes, events, calls)
    nodes = [_outside(node) if number in lost else node for number, node in enumerate(nodes)]
    calls = {number: call for number, call in calls.items() if number not in lost}
    segments = _segments(nodes, events)
    homes = _homes(nodes, segments, calls)
    wanted: list[set[int]] = [set() for _ in segments]  # nodes that later segments take
    asks = {}
    for index in reversed(range(len(segments))):
        segment = segments[index]
        writer = _Writer(nodes, homes, calls, index, segment)
        for node in sorted(writer.takes(wanted[index])):
            wanted[homes[node]].add(node)
        ask = writer.ask(sorted(wanted[index]))
        inputs = {event.input for event in segment}
        useful = len(inputs) > 1 or wanted[index]
        if ask is not None and useful and len(writer.steps) <= MAX_STEPS:
            asks[segment[0].start] = ask
    return dict(reversed(asks.items()))


def _lost(nodes: list[Node], events: list[Event], calls: Mapping[int, Call]) -> set[int]:
    """What cannot be computed again, since its call was not kept, and all that follows from it."""
    results = {event.result for event in events}
    lost: set[int] = set()
    for number, node in enumerate(nodes):
        if node.step is not None:
            is_lost = not lost.isdisjoint(node.operands)
        elif number in calls:
            is_lost = not lost.isdisjoint(calls[number].nodes)
        else:
            is_lost = number not in results and not node.is_outside
        if is_lost:
            lost.add(number)
    return lost


def _outside(node: Node) -> Node:
    return node._replace(step=None, args=(), is_outside=True)


def _segments(nodes: list[Node], events: list[Event]) -> list[list[Event]]:
    segments: list[list[Event]] = []
    for event in events:
        first = segments[-1][0] if segments else None
        joins = first is not None and event.rows == first.rows
        if nodes[event.input].is_outside:
            joins = joins and first is not None and event.input == first.input
        if joins:
            segments[-1].append(event)
        else:
            segments.append([event])
    return segments


def _homes(nodes: list[Node], segments: list[list[Event]], calls: Mapping[int, Call]) -> list[int]:
    """The segment in which each node can be computed first; -1: in any (a vector)."""
    of_result = {e.result: i for i, segment in enumerate(segments) for e in segment}
    of_input: dict[int, int] = {}
    for i, segment in enumerate(segments):
        of_input.setdefault(segment[0].input, i)
    homes: list[int] = []
    for number, node in enumerate(nodes):
        if node.step is None and number in calls:
            homes.append(homes[calls[number].of])
        elif node.step is None:
            homes.append(of_result.get(number, of_input.get(number, -1)))
        elif node.step is Step.VECTOR:
            homes.append(-1)
        else:
            homes.append(max((homes[arg] for arg in node.operands), default=-1))
    return homes


class _Writer:
    """Writes down one segment as a chain."""

    def __init__(
        self,
        nodes: list[Node],
        homes: list[int],
        calls: Mapping[int, Call],
        index: int,
        segment: list[Event],
    ) -> None:
        self._nodes = nodes
        self._homes = homes
        self._calls = calls
        self._index = index
        self._segment = segment
        self.steps: list[Instruction] = []
        self._values = {segment[0].input: 0}  # node → number of its value
        self._takes: list[int] = []
        self._weights: list[tuple[int, int]] = []

    def takes(self, wanted: set[int]) -> list[int]:
        """The nodes of earlier segments that the chain needs; they become its next inputs, and
        then what the client computes."""
        found: set[int] = set()
        for root in (*(event.input for event in self._segment), *wanted):
            self._collect(root, found)
        earlier = sorted(node for node in found if self._homes[node] < self._index)
        self._takes = earlier + sorted(found.difference(earlier))
        for node in self._takes:
            self._values[node] = len(self._values)
        return earlier

    def ask(self, wanted: list[int]) -> Ask | None:
        """The chain that answers the segment's products and returns the ``wanted`` nodes."""
        for event in self._segment:
            self._product(event, self._value(event.input))
        order: list[int] = []  # nodes that are outputs

        def output(node: int) -> int:
            if node == self._segment[0].input:
                return SENT
            if node not in order:
                order.append(node)
            return order.index(node)

        answers = tuple(Answer(e.member, output(e.input), output(e.result)) for e in self._segment)
        keeps = tuple((node, output(node)) for node in wanted)
        if len({self._nodes[node].dtype for node in order}) > 1:
            return None  # outputs side by side are of one dtype
        values = tuple(self._value(node) for node in order)
        chain = Chain(tuple(self.steps), values)
        weights, biases = zip(*self._weights, strict=True)
        held = {SENT, *(answer.result for answer in answers)}
        compared = {*(a.input for a in answers[1:]), *(index for _, index in keeps)}
        copied = tuple(held & compared)
        widths = tuple(self._nodes[node].width for node in order)
        return Ask(
            weights,
            biases,
            pack_chain(chain),
            tuple(self._takes),
            answers,
            keeps,
            copied,
            widths,
            self._segment[0].input,
            self._computed_here(),
        )

    def _computed_here(self) -> tuple[tuple[int, Call], ...]:
        """What is taken and no earlier chain returns, after what that is computed from."""
        needed = [node for node in self._takes if self._homes[node] == self._index]
        calls: dict[int, Call] = {}
        while needed:
            node = needed.pop()
            if node in self._calls and node not in calls:
                calls[node] = self._calls[node]
                needed += calls[node].nodes
        return tuple(sorted(calls.items()))  # nodes are numbered as they came about

    def _collect(self, node: int, found: set[int]) -> None:
        if node in self._values:
            return
        is_earlier = 0 <= self._homes[node] < self._index
        if is_earlier or (self._nodes[node].step is None and node in self._calls):
            found.add(node)
        else:
            for arg in self._nodes[node].operands:
                self._collect(arg, found)

    def _value(self, node: int) -> int:
        if node not in self._values:
            step, args = self._nodes[node].step, self._nodes[node].args
            assert step is not None  # a product's result has its value already
            numbers = list(args) if step is Step.VECTOR else [self._value(arg) for arg in args]
            if step is Step.CAST:
                numbers.append(self._nodes[node].cast)
            a, b, c = (*numbers, 0, 0)[:3]
            self._add(node, Instruction(step, a, b, c, self._nodes[node].number))
        return self._values[node]

    def _product(self, event: Event, value: int) -> None:
        op, weight, _, bias = event.member
        self._weights.append((weight, bias))
        self._add(event.result, Instruction(PRODUCTS[op], value, len(self._weights) - 1))

    def _add(self, node: int, instruction: Instruction) -> None:
        self._values[node] = 1 + len(self._takes) + len(self.steps)
        self.steps.append(instruction)
