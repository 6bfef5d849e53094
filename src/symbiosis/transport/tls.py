"""TLS 1.3 for both ends, and the key that a client presents. Python's ssl module, nothing older.

No session tickets: who comes back shows its certificate again. The hostname is always verified,
and there is no way to say otherwise.
"""

from __future__ import annotations

import dataclasses
import selectors
import socket
import ssl
from pathlib import Path
from typing import Any

from symbiosis.errors import ConnectionFailed

_RECORDS_AT_ONCE = 64
"""Records (16 KiB) taken from one connection before others have their turn."""


class Secret:
    """An API key that does not show in logs and tracebacks by accident.

    Pickling one keeps the key: a worker process connects by itself and has to present it.
    """

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "<key>"


@dataclasses.dataclass(frozen=True)
class Tls:
    """What a client trusts and shows; PEM files."""

    ca: str | Path | None = None
    """Authorities that may have signed the executor's certificate; None: the system's."""
    cert: str | Path | None = None
    """The client's own certificate and chain, if the executor asks for one."""
    key: str | Path | None = None
    """Its private key; None: in the same file."""


@dataclasses.dataclass(frozen=True)
class ServerTls:
    """What an executor shows and asks for; PEM files."""

    cert: str | Path
    key: str | Path | None = None
    client_ca: str | Path | None = None
    """If given, every client has to show a certificate that one of these authorities signed."""

    def context(self) -> ssl.SSLContext:
        """Raises ConnectionFailed that names the file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        _load_chain(context, self.cert, self.key)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            _load_authorities(context, self.client_ca)
        return context


def client_context(tls: Tls) -> ssl.SSLContext:
    """Raises ConnectionFailed that names the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and hostname
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if tls.ca is None:
        context.load_default_certs()
    else:
        _load_authorities(context, tls.ca)
    if tls.cert is not None:
        _load_chain(context, tls.cert, tls.key)
    return context


def _load_chain(context: ssl.SSLContext, cert: str | Path, key: str | Path | None) -> None:
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConnectionFailed(
            f"cannot use the certificate {cert} with the private key {key or cert}: "
            f"{reason_of(error)}"
        ) from None


def _load_authorities(context: ssl.SSLContext, ca: str | Path) -> None:
    try:
        context.load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise ConnectionFailed(
            f"cannot read the certificates of authorities in {ca}: {reason_of(error)}"
        ) from None


def secure(
    connection: socket.socket, context: ssl.SSLContext, host: str, url: str
) -> ssl.SSLSocket:
    """Shake hands as a client, within the socket's own timeout. Raises ConnectionFailed."""
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise ConnectionFailed(
            f"the certificate of {url} is not trusted: {error.verify_message}. Give the authority "
            f"that signed it (tls=Tls(ca=...), --tls-ca) and the hostname that it is made for"
        ) from None
    except (OSError, ValueError) as error:
        connection.close()
        raise ConnectionFailed(
            f"no TLS 1.3 with {url} ({reason_of(error)}): is it an executor's tls:// address, not "
            f"a tcp:// one?"
        ) from None


def reason_of(error: BaseException) -> str:
    """In words, without OpenSSL's source lines."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(getattr(error, "strerror", None) or error)


class TlsSocket:
    """An accepted connection under TLS that never blocks, used as a plain socket would be.

    `recv_into` and `send` raise BlockingIOError where a plain socket would. ``waits_for`` is
    what the TLS layer itself waits for (events of `selectors`), if that is not simply what the
    caller asked for: reading can need to write, and the other way round.
    """

    def __init__(self, accepted: socket.socket, context: ssl.SSLContext) -> None:
        self._socket = context.wrap_socket(
            accepted, server_side=True, do_handshake_on_connect=False
        )
        self.family = self._socket.family
        self.established = False
        self.waits_for = selectors.EVENT_READ

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def settimeout(self, timeout_s: float) -> None:
        """As of a plain socket; 0: never blocks."""
        self._socket.settimeout(timeout_s)

    def sendall(self, data: memoryview) -> None:
        """Blocks for as long as `settimeout` said."""
        self._socket.sendall(data)

    def shake_hands(self) -> bool:
        """Go on with the handshake; True when it is done. Raises OSError when it has failed."""
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self.waits_for = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            self.waits_for = selectors.EVENT_WRITE
        else:
            self.established, self.waits_for = True, 0
        return self.established

    def begins_in_plain(self) -> bool:
        """Does the peer speak our protocol without TLS?"""
        try:
            return socket.socket.recv(self._socket, 2, socket.MSG_PEEK) == b"SY"
        except OSError:
            return False

    def send_in_plain(self, data: bytes) -> None:
        """To a peer that speaks no TLS; what does not fit is lost."""
        socket.socket.send(self._socket, data)

    def peer_names(self) -> tuple[str, ...]:
        """The common name and the alternative names of the client's certificate; () if it has
        shown none."""
        certificate: dict[str, Any] | None = self._socket.getpeercert()
        if not certificate:
            return ()
        parts = [pair for part in certificate.get("subject", ()) for pair in part]
        common = [str(value) for kind, value in parts if kind == "commonName"]
        others = [str(value) for _, value in certificate.get("subjectAltName", ())]
        return tuple(dict.fromkeys([*common, *others])) or ("unnamed",)

    @property
    def pending(self) -> bool:
        """Has anything been decrypted and not been read? `select` does not see it."""
        return self._socket.pending() > 0

    def recv_into(self, buffer: memoryview) -> int:
        """Several records if they are there: one a call is 16 KiB at most."""
        self.waits_for, received = 0, 0
        for _ in range(_RECORDS_AT_ONCE):
            try:
                more = self._socket.recv_into(buffer[received:])
            except ssl.SSLWantReadError:
                break
            except ssl.SSLWantWriteError:
                self.waits_for = selectors.EVENT_WRITE
                break
            received += more
            if not more or received == len(buffer):
                return received
        if not received:
            raise BlockingIOError
        return received

    def send(self, data: memoryview) -> int:
        """After a BlockingIOError the next call must bring the same bytes: part of them is
        under way."""
        self.waits_for = 0
        try:
            return self._socket.send(data)
        except ssl.SSLWantWriteError:
            raise BlockingIOError from None
        except ssl.SSLWantReadError:
            self.waits_for = selectors.EVENT_READ
            raise BlockingIOError from None
