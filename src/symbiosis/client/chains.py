"""What a decoder will ask for next, learned by watching, asked for at once, and verified.

Between two products a model often does nothing but arithmetic that the executor can do as well:
a residual sum, a norm, an activation function. After two equal passes (tokens), one pass is
traced; where the input of the next product follows from earlier results, products are linked to
a chain. From then on the first product of a chain asks for all of it, and the answers wait.
What an adapter adds to the first product is computed ahead as well, and sent along; the model
computes it again when it comes there.

Nothing is ever taken on trust: the answer to a later product comes with the input that the
executor computed it for, and it is used only if the model's own input has the same bits. So an
adapter that is switched, a vector that was trained, a branch that was not taken, another device
with other rounding cost an exchange, and never change a result. After three misses in a row
all chains are forgotten, and learned anew later.

Knows tensors and nodes; knows no channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from symbiosis.client.linking import SENT, Ask, Event, Member, Start, link, start_of
from symbiosis.client.trace import Trace, plain
from symbiosis.wire.exchange import Op

logger = logging.getLogger(__name__)

MAX_INPUT_BYTES = 64 << 10
"""Larger inputs are prefill or training, where bytes count and not exchanges."""

_MOST_MISSES = 3
_LONGEST_PAUSE = 1024  # passes


class Chains:
    """Learns, asks and verifies for one session, which guards it with its lock."""

    def __init__(self, vector_id: Callable[[Tensor], int]) -> None:
        self._vector_id = vector_id
        self._asks: dict[Start, Ask] = {}
        self._answers: dict[Member, tuple[Tensor, Tensor]] = {}
        self._kept: dict[int, Tensor] = {}
        self._misses = 0
        self._pause = 1
        self._wait = 0  # equal passes before the next one is traced
        self._pass: list[Member] = []
        self._seen: set[Member] = set()  # in this pass
        self._last_pass: list[Member] = []
        self._trace: Trace | None = None
        self._events: list[Event] = []
        self._outside: dict[tuple[object, ...], tuple[int, Tensor]] = {}

    @property
    def chains(self) -> list[tuple[Member, ...]]:
        """The products of each chain, in order."""
        return [tuple(answer.member for answer in ask.answers) for ask in self._asks.values()]

    def answer(self, member: Member, x: Tensor) -> Tensor | None:
        """The result of a product on ``x`` if it has come with a chain, for these very bits."""
        found = self._answers.pop(member, None)
        if found is None:
            return None
        expected, result = found
        if not _is_the_same(x, expected):
            self._missed()
            return None
        if not self._answers:  # all of a chain was used
            self._misses = 0
        return _shaped(result, member, x)

    def ask(self, member: Member, x: Tensor) -> tuple[Ask, tuple[Tensor, ...]] | None:
        """The chain to ask for instead of the one product, with the tensors to send."""
        ask = self._asks.get(start_of(member, x))
        if ask is None:
            return None
        if self._answers:  # the last chain was not used up
            self._missed()
        computed = {ask.sent: x}
        try:
            for node, call in ask.calls:
                computed[node] = call.again(computed)
        except Exception:  # noqa: BLE001 (an adapter was deleted: it is no more than a guess)
            self._missed()
            return None
        try:
            further = [computed[n] if n in computed else self._kept[n] for n in ask.takes]
            return ask, (x, *further)
        except KeyError:
            return None

    def arrived(self, ask: Ask, x: Tensor, outputs: Tensor) -> Tensor:
        """Keep what a chain returned for ``x``: ``outputs`` (rows, sum of widths), side by side.
        Returns the result of its first product."""
        parts = torch.split(outputs, list(ask.widths), 1)
        if len(outputs) > 1:
            parts = tuple(part.contiguous() for part in parts)
        inputs = {SENT: x, **dict(enumerate(parts))}
        for index in ask.copied:  # the model may change in place what it has in hands
            inputs[index] = inputs[index].clone()
        first, *later = ask.answers
        self._answers = {a.member: (inputs[a.input], parts[a.result]) for a in later}
        for node, index in ask.keeps:
            self._kept[node] = inputs[index]
        return _shaped(parts[first.result], first.member, x)

    def observe(self, member: Member, x: Tensor, given: Tensor, result: Tensor) -> Tensor:
        """A product was answered; the result to hand on (watched, in a pass that is traced).
        ``given``: the input as the model holds it."""
        if self._asks:  # nothing to learn
            return result
        if self._pass and member == self._pass[0]:
            self._pass_ended()
        elif member in self._seen or (member[0] is Op.EMBEDDING and not self._begun_by_lookup):
            self._start_again()
        self._pass.append(member)
        self._seen.add(member)
        if self._trace is None:
            return result
        return self._traced(self._trace, member, x, given, result)

    @property
    def _begun_by_lookup(self) -> bool:
        """A pass begins with a lookup, where there is one, and ends with the logits."""
        return bool(self._pass) and self._pass[0][0] is Op.EMBEDDING

    def forget(self) -> None:
        """Drop what was learned and what waits."""
        self._asks.clear()
        self._answers.clear()
        self._kept.clear()
        self._start_again()

    def give_up(self) -> None:
        """Forget the chains, and learn them anew after a pause that is longer each time."""
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._wait = self._pause
        self._misses = 0
        self.forget()

    def _missed(self) -> None:
        self._answers.clear()
        self._misses += 1
        if self._misses >= _MOST_MISSES:
            logger.debug("the model took another way three times: its chains are forgotten")
            self.give_up()

    def _start_again(self) -> None:
        self._pass = []
        self._last_pass = []
        self._seen.clear()
        self._end_trace()

    def _pass_ended(self) -> None:
        if self._trace is not None:
            calls = {node: call for node, call in self._trace.calls.items() if call.is_lasting}
            self._asks = link(self._trace.nodes, self._events, calls)
            logger.debug("learned %d chains", len(self._asks))
            if not self._asks:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._wait = self._pause
            self._end_trace()
        elif self._pass == self._last_pass:
            self._wait -= 1
            if self._wait < 0:
                self._trace = Trace(self._vector_id)
        self._last_pass, self._pass = self._pass, []
        self._seen.clear()

    def _end_trace(self) -> None:
        if self._trace is not None:
            self._trace.close()
        self._trace = None
        self._events = []
        self._outside = {}

    def _traced(
        self, trace: Trace, member: Member, x: Tensor, given: Tensor, result: Tensor
    ) -> Tensor:
        node = trace.node_of(x)
        if node is None:
            node = self._outside_node(trace, plain(x))
            if x.is_floating_point():
                trace.follow(given, node)
        watched = trace.watch(result)
        self._events.append(Event(start_of(member, x), node, len(trace.nodes) - 1))
        # The pass's last result (logits) leaves the model: nobody need watch it.
        return result if len(self._events) == len(self._last_pass) else watched

    def _outside_node(self, trace: Trace, x: Tensor) -> int:
        key = (x.data_ptr(), x._version, x.shape)
        if key not in self._outside:
            self._outside[key] = (trace.outside(x), x)  # kept, so that its memory stays its own
        return self._outside[key][0]


def _is_the_same(x: Tensor, expected: Tensor) -> bool:
    """Bit for bit, as rows?"""
    alike = x.numel() == expected.numel() and x.dtype is expected.dtype
    return alike and x.device == expected.device and torch.equal(x.view(expected.shape), expected)


def _shaped(result: Tensor, member: Member, x: Tensor) -> Tensor:
    """The executor's rows (T, O) in the leading shape of the input."""
    leading = x.shape if member[0] is Op.EMBEDDING else x.shape[:-1]
    return result.view(*leading, result.shape[-1])
