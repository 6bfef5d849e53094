"""The interface that every transport offers to a client."""

from __future__ import annotations

from typing import Protocol

import torch

from symbiosis.transport.lent import Lent
from symbiosis.wire.exchange import Exchange, Result
from symbiosis.wire.frames import Json


class Channel(Protocol):
    """One client's connection. Not thread-safe: the session serialises its use."""

    @property
    def welcome(self) -> Json:
        """What the executor said of itself when this channel was opened."""

    @property
    def lent(self) -> Lent | None:
        """The weights that the executor lends, if it does, over this transport."""

    def exchange(self, exchange: Exchange) -> Result:
        """Send one exchange and wait for its result.

        The result's tensors are on the CPU, contiguous, and belong to the caller. Raises
        ExchangeRefused (the channel stays usable), ConnectionLost, ProtocolError.
        """

    def request(self, question: Json) -> tuple[Json, torch.Tensor]:
        """Ask a question outside the data path; the answer's JSON and its payload (uint8).

        Raises FetchRefused, SymbiosisError as the executor answers, ConnectionLost.
        """

    def close(self) -> None:
        """Leave; idempotent."""
