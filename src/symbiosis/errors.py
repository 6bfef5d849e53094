"""One tree of errors; every message says what was wrong, where, and what to do.

::

    SymbiosisError
    ├── ProtocolError           the bytes on the wire make no sense; the connection is closed
    │   └── DamagedFrame        they are not those that were sent: a checksum is wrong
    ├── ConnectionFailed        no executor answers at that address
    ├── AuthenticationFailed    no key, a wrong one, or one that is no longer valid: never which
    ├── QuotaExceeded           the tenant has used up what it may
    ├── ConnectionLost          the executor or the network went away in mid-session
    ├── ExchangeRefused         the executor understood the exchange and will not run it
    │   ├── UnknownWeight       no such weight in the hosted model
    │   ├── UnknownOperation    not on the executor's closed list
    │   ├── InvalidInput        shape, dtype or value does not fit the weight
    │   └── ExchangeFailed      the computation itself failed (out of memory, for example)
    ├── IntegrityError          an answer is not the product that was asked for
    ├── RequestRefused          this tenant may not ask that
    │   └── FetchRefused        this executor does not hand out its weights
    ├── KeyStoreError           the file of keys and tenants is malformed, or others can read it
    ├── UnsupportedOperation    no meaning is defined for this use of a remote weight
    ├── PrivacyError            a privacy mode cannot keep its promise, so nothing was sent
    ├── ModelError              a model folder cannot be hosted, or is not the one hosted here
    ├── WriteFailed             a file could not be written, because the disk is full for example
    ├── DataError               a line of a data set is malformed
    └── MethodError             an unknown PEFT method or option

Errors that cross the wire carry ``code``; ``from_code`` makes them again on the other side.
This module knows nothing of the rest of the package.
"""

from __future__ import annotations


class SymbiosisError(Exception):
    """Root of everything that this package raises on purpose."""

    code = "error"


class ProtocolError(SymbiosisError):
    """A malformed, oversized or unexpected frame."""

    code = "protocol"


class DamagedFrame(ProtocolError):
    """Bytes that changed on their way; sent again over a new connection they may arrive."""

    code = "damaged"


class ConnectionFailed(SymbiosisError):
    """No executor could be reached."""

    code = "connection-failed"


class AuthenticationFailed(SymbiosisError):
    """The executor does not know this client; the connection is closed. It does not say why."""

    code = "authentication-failed"


class QuotaExceeded(SymbiosisError):
    """The tenant has used up its sessions or its executor time."""

    code = "quota-exceeded"


class ConnectionLost(SymbiosisError):
    """The connection ended while something was still expected from it."""

    code = "connection-lost"


class ExchangeRefused(SymbiosisError):
    """The executor will not run this exchange; the session goes on."""

    code = "refused"


class UnknownWeight(ExchangeRefused):
    """The exchange names a weight that the hosted model does not have."""

    code = "unknown-weight"


class UnknownOperation(ExchangeRefused):
    """The exchange names an operation that is not on the executor's list."""

    code = "unknown-operation"


class InvalidInput(ExchangeRefused):
    """Shape, dtype or value of the input does not fit the operation."""

    code = "invalid-input"


class ExchangeFailed(ExchangeRefused):
    """The executor tried and failed, for example for want of memory."""

    code = "exchange-failed"


class IntegrityError(SymbiosisError):
    """An answer is not the product with the weight that it should be; the session has ended."""

    code = "integrity"


class RequestRefused(SymbiosisError):
    """A question outside the data path that this tenant may not ask."""

    code = "request-refused"


class FetchRefused(RequestRefused):
    """The executor's policy does not let weights leave it."""

    code = "fetch-refused"


class KeyStoreError(SymbiosisError):
    """The file of keys and tenants cannot be used."""

    code = "key-store"


class UnsupportedOperation(SymbiosisError, NotImplementedError):
    """A remote weight was used in a way that has no remote meaning."""

    code = "unsupported-operation"


class PrivacyError(SymbiosisError):
    """A privacy mode cannot keep its promise; what would have broken it was not sent."""

    code = "privacy"


class ModelError(SymbiosisError):
    """A model cannot be loaded, or is not the one that the executor hosts."""

    code = "model"


class WriteFailed(SymbiosisError):
    """A file of a job could not be written; the message names it."""

    code = "write-failed"


class DataError(SymbiosisError):
    """A data set cannot be read; the message names the file and the line."""

    code = "data"


class MethodError(SymbiosisError):
    """A PEFT method or one of its options is not known."""

    code = "method"


def _tree(root: type[SymbiosisError]) -> dict[str, type[SymbiosisError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_code(code: str, message: str) -> SymbiosisError:
    """The error that the other side meant; an unknown code becomes the root class."""
    return _tree(SymbiosisError).get(code, SymbiosisError)(message)
