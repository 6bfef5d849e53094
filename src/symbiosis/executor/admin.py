"""What an operator asks on the administration socket: a closed list of verbs.

The same frames as everywhere, behind a door of its own: a UNIX socket of mode 0600. No data door
answers these questions, and this one answers no others. Lives in the server's thread.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import torch

from symbiosis.errors import ProtocolError
from symbiosis.executor.connection import Connection, Fitted
from symbiosis.wire.frames import VERSION, Json, Kind
from symbiosis.wire.tensors import empty_payload

if TYPE_CHECKING:
    from symbiosis.executor.executor import Executor

logger = logging.getLogger(__name__)

VERBS = ("status", "tenants", "reload", "drain", "disconnect")


class Administration:
    """The desk behind the administration socket; see `Desk`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._numbers = itertools.count(-1, -1)  # apart from the numbers of clients

    def attach(
        self, hello: Json, transport: str, certificate: tuple[str, ...] = ()
    ) -> tuple[int, Json]:
        if hello.get("protocol") != VERSION:
            raise ProtocolError(f"this executor speaks protocol {VERSION}: use the same release")
        number = next(self._numbers)
        return number, {"protocol": VERSION, "session": number, "verbs": list(VERBS)}

    def detach(self, client: int) -> None:
        pass

    def lend(self, client: int, pid: int | None) -> None:
        """Nothing: an operator computes nothing."""

    def answer(self, client: int, question: Json) -> tuple[Json, torch.Tensor]:
        """Raises ProtocolError for what is no verb, KeyStoreError, SymbiosisError."""
        verb = question.get("admin")
        if verb != "status" and verb in VERBS:
            logger.info("administration: %s %s", verb, question.get("client", ""))
        return self._answer(verb, question), empty_payload(0)

    def _answer(self, verb: object, question: Json) -> Json:
        executor = self._executor
        match verb:
            case "status":
                return executor.status()
            case "tenants":
                return {"tenants": executor.tenants()}
            case "reload":
                return {"ended": executor.reload()}
            case "drain":
                return {"sessions": executor.drain()}
            case "disconnect":
                number = question.get("client")
                executor.disconnect(number if type(number) is int else 0)
                return {}
        raise ProtocolError(f"unknown verb {str(verb)[:64]!r}; there are {', '.join(VERBS)}")


class AdminConnection(Connection):
    """Takes questions only."""

    def _fit_exchange(self, kind: Kind, meta: bytes, payload_bytes: int) -> Fitted:
        raise ProtocolError(f"the administration socket takes no {kind.name} frames")

    def _give_block(self, question: Json) -> Json:
        raise ProtocolError("the administration socket gives no memory")
