"""Masked products: what a client does around an exchange in the ring.

Activations become integers, a mask is added, the executor multiplies what it sees as noise, the
mask's own product is subtracted. Knows masks, scales and weights; the session sends.

Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from symbiosis.client.own_weights import OwnWeights
from symbiosis.client.session import Session
from symbiosis.errors import PrivacyError, ProtocolError
from symbiosis.privacy.fixed import from_fixed, to_fixed
from symbiosis.privacy.modes import MaskUse
from symbiosis.privacy.pool import Mask, MaskPool, Site
from symbiosis.privacy.ring import (
    WORDS,
    RingWeight,
    by_rows,
    centred,
    from_wire,
    quantise,
    ring_product,
    to_wire,
)
from symbiosis.wire.exchange import NO_BIAS, Op
from symbiosis.wire.frames import Json

RING_OF = {Op.LINEAR: Op.RING_LINEAR, Op.MATMUL: Op.RING_MATMUL}

SendRing = Callable[[Op, tuple[int, ...], Tensor], tuple[Tensor, ...]]
"""(ring operation, weights, residues as they travel) → the residues that came back."""


class RingFacts(NamedTuple):
    """What an executor says of one weight's integers."""

    axis: int
    shape: tuple[int, ...]
    digest: str
    norms: tuple[float, float]  # largest of a row, of a column
    scales: Tensor  # float32, along `axis`


def ring_facts(session: Session, bits: int) -> dict[int, RingFacts]:
    """By weight. Raises PrivacyError if the executor does not offer masked exchanges."""
    offered = session.welcome.get("masked")
    if not isinstance(offered, list) or bits not in offered:
        raise PrivacyError(
            f"{session.url} does not offer masked exchanges with {bits}-bit weights: ask its "
            f"operator to serve with --masked {bits}, or connect with another privacy mode"
        )
    answer, payload = session._request({"get": "ring", "bits": bits})
    try:
        scales = load(payload.numpy().tobytes())
        weights: list[Json] = answer["weights"]  # type: ignore[assignment]
        return {int(str(w["id"])): _facts(session, w, scales[str(w["id"])]) for w in weights}
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ProtocolError(
            f"{session.url} described its masked weights badly: {error!r}"
        ) from None


def _facts(session: Session, told: Json, scales: Tensor) -> RingFacts:
    """Raises what a malformed answer makes Python raise, ValueError among it."""
    shape, axis = session.weights[int(str(told["id"]))].shape, told["axis"]
    row, column = (float(norm) for norm in told["norms"])  # type: ignore[attr-defined]
    if axis not in (0, 1) or len(shape) != 2 or not 0 <= row < math.inf > column >= 0:
        raise ValueError(told)
    if scales.dtype is not torch.float32 or scales.shape != (shape[int(axis)],):
        raise ValueError(f"scales of {scales.dtype}, {list(scales.shape)}")
    return RingFacts(int(axis), shape, str(told["digest"]), (row, column), scales)


class MaskProducts:
    """The client itself multiplies masks: it has the weights' integers."""

    def __init__(self, facts: dict[int, RingFacts], own: OwnWeights, bits: int) -> None:
        self._facts = facts
        self._own = own
        self._bits = bits
        self._kept: dict[int, RingWeight] = {}

    def need(self, session: Session, weights: tuple[int, ...]) -> None:
        """Get those weights before masks are multiplied with them; with the session's lock."""
        for weight in weights:
            if weight not in self._kept:
                self._kept[weight] = self._read(session, weight)

    def compute(self, site: Site, mask: Mask) -> tuple[Tensor, ...]:
        """See `symbiosis.privacy.pool.Products`."""
        found = [self._kept[weight].numbers for weight in site.weights]
        matrices = [w if site.op is Op.RING_LINEAR else w.t() for w in found]

        def block(start: int, stop: int) -> list[Tensor]:
            mask.check_wanted()
            return [ring_product(w, mask.numbers[start:stop]) for w in matrices]

        return tuple(by_rows(site.rows, max(site.width, site.outputs), block))

    def stop(self) -> None:
        """There is nothing that takes long."""

    def close(self) -> None:
        self._kept.clear()

    bytes_received = 0

    def _read(self, session: Session, weight: int) -> RingWeight:
        info, fact = session.weights[weight], self._facts[weight]
        made = quantise(self._own.read(session, info, "masks"), fact.axis, self._bits)
        if made.digest() != fact.digest:
            raise PrivacyError(
                f"{info.names[0]} is not here what it is in the executor (their digests differ): "
                f"masks would not come off. Give the folder of the model that is hosted, in the "
                f"dtype that it is hosted in"
            )
        if made.norms != fact.norms or not torch.equal(made.scales, fact.scales):
            raise PrivacyError(
                f"{session.url} tells other scales or norms of {info.names[0]} than its integers "
                f"have: answers would be wrong. Do not use this executor"
            )
        return made


class HelperProducts:
    """A second executor multiplies masks: it is told their names, and sees nothing else."""

    def __init__(self, helper: Session, facts: dict[int, RingFacts], bits: int) -> None:
        """``facts`` are the first executor's. Raises PrivacyError if the helper's differ."""
        self._helper = helper
        self._facts = facts
        theirs = ring_facts(helper, bits)
        if theirs.keys() != facts.keys() or any(not _same(theirs[w], facts[w]) for w in facts):
            raise PrivacyError(
                f"the helper {helper.url} hosts other weights than the executor: masks would not "
                f"come off. Both must host the same model in the same dtype"
            )

    def need(self, session: Session, weights: tuple[int, ...]) -> None:
        """The helper has them."""

    def compute(self, site: Site, mask: Mask) -> tuple[Tensor, ...]:
        """See `symbiosis.privacy.pool.Products`."""
        key = torch.frombuffer(bytearray(mask.name.key), dtype=torch.uint8)
        params = (int(site.op), site.bits, site.rows, mask.name.number)
        no_biases = (NO_BIAS,) * len(site.weights)
        # Without the session's lock: the pool's thread alone calls this, and a child that was
        # forked meanwhile would find it held for ever.
        found = self._helper._exchange(
            Op.RING_MASK, site.weights, no_biases, (), params, (key,), True, mask.recording
        )
        sizes = [_outputs(site.op, self._facts[weight]) for weight in site.weights]
        return _residues(found, site.rows, sizes, site.bits, self._helper.url)

    def stop(self) -> None:
        """Wait no longer for a helper that has gone."""
        self._helper._closing.set()

    def close(self) -> None:
        self._helper.close()

    @property
    def bytes_received(self) -> int:
        return self._helper.stats().bytes_received


class Masking:
    """Products of one masked session. Not thread-safe; the session's lock guards it."""

    def __init__(
        self,
        facts: dict[int, RingFacts],
        source: MaskProducts | HelperProducts,
        bits: int,
        ahead_bytes: int,
    ) -> None:
        self._facts = facts
        self._source = source
        self._bits = bits
        self._pool = MaskPool(source.compute, ahead_bytes)

    def has(self, weight: int) -> bool:
        return weight in self._facts

    def shares_input(self, op: Op, weight: int) -> bool:
        """May it be asked for along with others? Not where its own scales go into the input."""
        return self._facts[weight].axis == (0 if op is Op.LINEAR else 1)

    def products(
        self,
        session: Session,
        op: Op,
        weights: tuple[int, ...],
        x: Tensor,
        send: SendRing,
        recording: bool,
    ) -> tuple[Tensor, ...]:
        """LINEAR or MATMUL of ``x`` (T, I), on the CPU, with each weight: float64 (T, O)."""
        facts = [self._facts[weight] for weight in weights]
        scale_inputs = not self.shares_input(op, weights[0])
        assert not scale_inputs or len(weights) == 1
        rows = x.double() * facts[0].scales if scale_inputs else x
        fixed = to_fixed(rows, self._norm(op, x.shape[1]), self._bits)
        sizes = [_outputs(op, fact) for fact in facts]
        site = Site(RING_OF[op], weights, x.shape[0], x.shape[1], sum(sizes), self._bits)
        self._source.need(session, weights)
        mask = self._pool.take(site, recording)
        # Built once: whoever sends it again sends these bytes. The mask is spent either way.
        masked = to_wire(self._reduced(fixed.residues.add_(mask.numbers)))
        sent = send(site.op, weights, masked)
        answers = _residues(sent, site.rows, sizes, self._bits, session.url)
        found = []
        for answer, product, fact in zip(answers, mask.products(), facts, strict=True):
            y = from_fixed(self._reduced(answer - product), fixed.steps)
            found.append(y if scale_inputs else y.mul_(fact.scales))
        return tuple(found)

    def use(self) -> MaskUse:
        return self._pool.use._replace(bytes_for_products=self._source.bytes_received)

    def stop(self) -> None:
        """Nobody waits for a mask any longer. From any thread, without the session's lock."""
        self._source.stop()
        self._pool.stop()

    def close(self) -> None:
        self._pool.close()
        self._source.close()

    def _norm(self, op: Op, width: int) -> float:
        """The largest over all weights that take so many inputs: what a product gives must not
        depend on what it is asked for along with."""
        at = 1 if op is Op.LINEAR else 0
        return max(f.norms[1 - at] for f in self._facts.values() if f.shape[at] == width)

    def _reduced(self, u: Tensor) -> Tensor:
        return u if self._bits == 8 else centred(u)


def _outputs(op: Op, fact: RingFacts) -> int:
    return fact.shape[0 if op in (Op.LINEAR, Op.RING_LINEAR) else 1]


def _residues(
    answers: tuple[Tensor, ...], rows: int, sizes: list[int], bits: int, url: str
) -> tuple[Tensor, ...]:
    """What came back, in memory, if it is what was asked for; raises ProtocolError."""
    words = (torch.int32, ()) if bits == 8 else (torch.int16, (WORDS,))
    for answer, size in zip(answers, sizes, strict=True):
        if (answer.dtype, answer.shape) != (words[0], (rows, size, *words[1])):
            raise ProtocolError(
                f"{url} answered a masked exchange with {answer.dtype} {list(answer.shape)}"
            )
    return tuple(from_wire(answer) for answer in answers)


def _same(a: RingFacts, b: RingFacts) -> bool:
    return a[:4] == b[:4] and torch.equal(a.scales, b.scales)
