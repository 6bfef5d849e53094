"""Counts what crosses a session's channel: exchanges and products, by layer, and operations.

Sits between a session and its channel. A layer is told from the name of the weight: what comes
before and with the first number in it (``model.layers.0.self_attn.q_proj.weight`` is of
``model.layers.0``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch

from symbiosis.transport.channel import Channel
from symbiosis.wire.exchange import Exchange, Result
from symbiosis.wire.frames import Json

_LAYER = re.compile(r".*?\.\d+(?=\.)")


class Recorder:
    """Counts until `clear`; `ops` is never cleared."""

    def __init__(self) -> None:
        self.ops: set[str] = set()
        self._exchanges: Counter[str] = Counter()  # by layer, "" for what is in none
        self._products: Counter[str] = Counter()
        self._layer_of: dict[int, str] = {}

    def opener(self, opener: Callable[[Json], Channel]) -> Callable[[Json], Channel]:
        """``opener``, with each channel that it opens recorded."""

        def open_recorded(hello: Json) -> Channel:
            channel = opener(hello)
            for weight in channel.welcome["weights"]:  # type: ignore[union-attr]
                found = _LAYER.match(weight["names"][0])  # type: ignore[index,call-overload]
                self._layer_of[weight["id"]] = found[0] if found else ""  # type: ignore[index,call-overload]
            return _Recorded(channel, self)

        return open_recorded

    def record(self, exchange: Exchange) -> None:
        layer = self._layer_of[exchange.weights[0]]
        self.ops.add(exchange.op.name)
        self._exchanges[layer] += 1
        self._products[layer] += len(exchange.weights)

    def clear(self) -> None:
        self._exchanges.clear()
        self._products.clear()

    @property
    def exchanges(self) -> int:
        return self._exchanges.total()

    @property
    def products(self) -> int:
        """Exchanges if each product had been one."""
        return self._products.total()

    @property
    def layers(self) -> int:
        return len([layer for layer in self._exchanges if layer])

    def worst_layer(self, *, products: bool = False) -> int:
        counter = self._products if products else self._exchanges
        return max((count for layer, count in counter.items() if layer), default=0)


class _Recorded:
    """A channel whose exchanges are recorded."""

    def __init__(self, channel: Channel, recorder: Recorder) -> None:
        self._channel = channel
        self._recorder = recorder

    @property
    def welcome(self) -> Json:
        return self._channel.welcome

    def exchange(self, exchange: Exchange) -> Result:
        self._recorder.record(exchange)
        return self._channel.exchange(exchange)

    @property
    def lent(self) -> None:
        """Nothing: what is computed here would not be recorded."""

    def request(self, question: Json) -> tuple[Json, torch.Tensor]:
        return self._channel.request(question)

    def close(self) -> None:
        self._channel.close()
