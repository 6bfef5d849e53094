"""May this exchange run? Decided from its meta section, before memory is allocated for it.

A client sends the same few meta sections again and again, so what was found out about one is
kept. Knows what exchanges look like on the wire; knows no sockets.
"""

from __future__ import annotations

from symbiosis.errors import ProtocolError
from symbiosis.executor.engine import Engine
from symbiosis.executor.ops import Plan
from symbiosis.wire.exchange import Exchange, unpack_exchange
from symbiosis.wire.frames import Limits
from symbiosis.wire.places import Places, unpack_places
from symbiosis.wire.tensors import offsets

_MISFIT = "an exchange's payload does not fit its description"
_MOST_KEPT = 8192
_SHORT_META_BYTES = 4096

_Found = tuple[Exchange, Plan, int]
"""An exchange without its tensors, what `Engine.admit` found out, and the tensors' bytes."""


class Admission:
    """What was found out about meta sections. Used by the server's thread alone."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._kept: dict[bytes, _Found] = {}

    def admit(self, meta: bytes, payload_bytes: int) -> tuple[Exchange, Plan, None]:
        """An exchange whose tensors follow in the payload.

        Raises ProtocolError (it makes no sense), or what `Engine.admit` has against it.
        """
        known = self._kept.get(meta)
        if known is None:
            exchange = unpack_exchange(meta)
            expected = offsets(exchange.specs)[1]
            if expected != payload_bytes:
                raise ProtocolError(_MISFIT)
            known = self._check(meta, exchange, expected)
        exchange, plan, expected = known
        if expected != payload_bytes:
            raise ProtocolError(_MISFIT)
        return exchange, plan, None

    def admit_placed(
        self, meta: bytes, payload_bytes: int, arena_bytes: int
    ) -> tuple[Exchange, Plan, Places]:
        """The same for an exchange with tensors in its client's ``arena_bytes`` of memory."""
        places, at = unpack_places(meta)
        known = self._kept.get(meta[at:])
        exchange = unpack_exchange(meta[at:]) if known is None else known[0]
        places.check(exchange.specs, arena_bytes)
        if offsets(places.inline(exchange.specs))[1] != payload_bytes:
            raise ProtocolError(_MISFIT)
        total = offsets(exchange.specs)[1]
        if total > self._limits.payload_bytes:
            raise ProtocolError(f"inputs of {total} bytes; {self._limits.payload_bytes} at most")
        if known is None:
            known = self._check(meta[at:], exchange, total)
        return exchange, known[1], places

    def _check(self, meta: bytes, exchange: Exchange, num_bytes: int) -> _Found:
        known = exchange, self._engine.admit(exchange), num_bytes
        if len(meta) <= _SHORT_META_BYTES:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[meta] = known
        return known
