"""A connection over TLS: the same frames, and either direction may wait for the other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from symbiosis.errors import ProtocolError
from symbiosis.executor.connection import Connection, Desk
from symbiosis.executor.outbox import EncryptedOutbox
from symbiosis.transport.tls import TlsSocket, reason_of
from symbiosis.wire.frames import error_frame

if TYPE_CHECKING:
    from symbiosis.executor.server import Server

logger = logging.getLogger(__name__)


class EncryptedConnection(Connection):
    """One client behind a ``tls://`` address."""

    def __init__(self, server: Server, accepted: TlsSocket, desk: Desk) -> None:
        super().__init__(server, accepted, "tls", desk)
        self._tls = accepted
        self._outbox = EncryptedOutbox(accepted)

    def _go_on(self, events: int) -> None:
        if not self._tls.established:
            self._shake_hands()
        else:
            if self._outbox.parts:
                self._flush()
            self._read_on()
        self._update_events()

    def _resume(self) -> None:
        self._work()
        if not self._closed and self._tls.pending:
            self._read_on()

    def _read_on(self) -> None:
        if self._closed or self._held_back:
            return
        self._read()
        if not self._closed and not self._held_back and self._tls.pending:
            self._server.resume(self)  # `select` does not see what is decrypted already

    def _shake_hands(self) -> None:
        if self._tls.begins_in_plain():
            logger.warning("a client came to a tls:// address without TLS")
            error = ProtocolError("this address takes TLS only: connect to tls://HOST:PORT")
            self._tls.send_in_plain(error_frame(0, error))
            self.close()
            return
        try:
            self._tls.shake_hands()
        except OSError as error:
            logger.warning("a client's TLS handshake failed: %s", reason_of(error))
            self.close()

    def _certificate_names(self) -> tuple[str, ...]:
        return self._tls.peer_names()

    def _wanted_events(self) -> int:
        return self._tls.waits_for or super()._wanted_events()
