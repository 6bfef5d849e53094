"""A channel within one process: no bytes, no copies.

The caller lends its thread: when the engine is idle it computes its own exchange at once, else
it computes whatever the scheduler puts first until its own is done.
"""

from __future__ import annotations

from typing import Protocol

import torch

from symbiosis.errors import ConnectionLost, SymbiosisError
from symbiosis.wire.exchange import Exchange, Result
from symbiosis.wire.frames import Json
from symbiosis.wire.tensors import unviewed


class Host(Protocol):
    """What an executor offers to clients of its own process."""

    def attach(self, hello: Json) -> tuple[int, Json]:
        """Take a client on; its number and the welcome."""

    def compute(self, client: int, exchange: Exchange) -> Result | SymbiosisError:
        """Check, queue, and help until this exchange is answered."""

    def answer(self, client: int, question: Json) -> tuple[Json, torch.Tensor]:
        """Answer a request; raises its refusal."""

    def detach(self, client: int) -> None:
        """The client leaves."""


class InprocChannel:
    """See `Channel`; the result's tensors are the engine's own outputs."""

    lent = None

    def __init__(self, host: Host, hello: Json) -> None:
        self._host = host
        self._client, self.welcome = host.attach(hello)
        self._closed = False

    def exchange(self, exchange: Exchange) -> Result:
        self._check_open()
        outcome = self._host.compute(self._client, exchange)
        if isinstance(outcome, SymbiosisError):
            raise outcome
        return outcome._replace(tensors=tuple(unviewed(tensor) for tensor in outcome.tensors))

    def request(self, question: Json) -> tuple[Json, torch.Tensor]:
        self._check_open()
        answer, payload = self._host.answer(self._client, question)
        return answer, payload.clone()  # a fetched weight must not be the hosted one itself

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._host.detach(self._client)

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionLost("this session is closed")
