"""Forward products, with what will be asked for next.

Two ways to need fewer exchanges than products: products on the very same input are asked for
together (`symbiosis.client.groups`), and a decoder's next products are asked for ahead
(`symbiosis.client.chains`). Neither changes a result. Knows no channels: whoever makes one says
how an exchange is sent, and guards it with a lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from symbiosis.client.chains import MAX_INPUT_BYTES, Chains
from symbiosis.client.groups import InputGroups
from symbiosis.client.linking import Ask, Member
from symbiosis.client.trace import plain
from symbiosis.errors import ExchangeRefused
from symbiosis.wire.exchange import Op

Send = Callable[
    [Op, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[Tensor, ...], bool],
    tuple[Tensor, ...],
]
"""(operation, weights, biases, params, tensors, whether gradients are recorded) → results."""


_MOST_ROW_COUNTS = 16


class _Siblings(NamedTuple):
    """Results that came with the first product on ``x``, for the products to follow."""

    x: Tensor  # kept alive, so that its memory cannot become another input meanwhile
    input_key: tuple[object, ...]
    results: dict[Member, Tensor]


class Ahead:
    """Answers forward products of one session. Not thread-safe."""

    def __init__(self, vector_id: Callable[[Tensor], int], *, in_process: bool = False) -> None:
        """``vector_id`` gives the id of a shipped vector that a tensor is, or 0. ``in_process``:
        an exchange is a call, which on a GPU does not wait for what it computes."""
        self._groups: InputGroups[Member] = InputGroups()
        self._siblings: _Siblings | None = None
        self._last_input: Tensor | None = None  # alive, so that the next is not taken for it
        self._vector_id = vector_id
        self._in_process = in_process
        self.verify: Callable[[Ask, Tensor, Tensor], None] | None = None
        """Called with a chain, its input and its outputs, before they are used."""
        self._chains: dict[int, Chains] = {}  # by the rows of a pass: they are learned apart
        self.grouped = 0
        """Products answered along with another, without an exchange of their own."""

    def product(self, member: Member, given: Tensor, recording: bool, send: Send) -> Tensor:
        """A LINEAR, MATMUL or EMBEDDING of what is ``given``, with a whole weight. ``recording``:
        gradients are recorded, so that this is training, where nothing is chained; nor is it where
        comparing a chain's inputs would make the host wait for a GPU, and an exchange would not."""
        x = given.detach().contiguous()
        if x.nbytes > MAX_INPUT_BYTES or recording or (self._in_process and x.is_cuda):
            return self.together(member, plain(x), recording, send)
        chains = self._chains_for(x.numel() // (1 if member[0] is Op.EMBEDDING else x.shape[-1]))
        result = chains.answer(member, plain(x))
        if result is not None:
            self.grouped += 1
        elif (asked := chains.ask(member, plain(x))) is not None:
            result = self._asked(chains, *asked, send)
        if result is None:
            result = self.together(member, plain(x), False, send)
        return chains.observe(member, x, given, result)

    def _asked(
        self, chains: Chains, ask: Ask, tensors: tuple[Tensor, ...], send: Send
    ) -> Tensor | None:
        """The result of the chain's first product; None if the executor refuses the chain, which is
        no more than a guess of ours."""
        try:
            (outputs,) = send(Op.CHAIN, ask.weights, ask.biases, ask.params, tensors, False)
        except ExchangeRefused:
            chains.give_up()
            return None
        if self.verify is not None:
            self.verify(ask, tensors[0], outputs)
        return chains.arrived(ask, tensors[0], outputs)

    def clear(self) -> None:
        """Drop results that wait for their products."""
        self._siblings = self._last_input = None
        for chains in self._chains.values():
            chains.forget()
        self._chains.clear()

    def plan(self) -> list[tuple[Member, ...]]:
        """The products of every chain that has been learned, in order."""
        return [chain for chains in self._chains.values() for chain in chains.chains]

    def _chains_for(self, rows: int) -> Chains:
        found = self._chains.pop(rows, None)
        if found is None:
            if len(self._chains) == _MOST_ROW_COUNTS:  # the one that was not used for longest
                self._chains.pop(next(iter(self._chains))).forget()
            found = Chains(self._vector_id)
        self._chains[rows] = found
        return found

    def together(self, member: Member, x: Tensor, recording: bool, send: Send) -> Tensor:
        """As `product`, along with what shares the input, but without chains."""
        op, weight, _, bias = member
        if op is Op.EMBEDDING:
            return send(op, (weight,), (bias,), (), (x,), recording)[0]
        input_key = (x.data_ptr(), x._version, x.shape, x.dtype)
        found = self._from_sibling(input_key, member)
        self._groups.observe(input_key, member)
        self._last_input = x
        if found is not None:
            return found
        members = [m for m in self._groups.members(member) if m[0] == op]
        weights, biases = zip(*[(m[1], m[3]) for m in members], strict=True)
        results = send(op, weights, biases, (), (x,), recording)
        if len(members) > 1:
            rest = dict(zip(members[1:], results[1:], strict=True))
            self._siblings = _Siblings(x, input_key, rest)
        return results[0]

    def _from_sibling(self, input_key: tuple[object, ...], member: Member) -> Tensor | None:
        siblings = self._siblings
        if siblings is None:
            return None
        if siblings.input_key != input_key:
            self._siblings = None
            return None
        found = siblings.results.pop(member, None)
        if found is not None:
            self.grouped += 1
        return found
