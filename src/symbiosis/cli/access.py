"""What lets a command in: the key and the certificates, from options and the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from symbiosis.errors import SymbiosisError

if TYPE_CHECKING:
    from symbiosis.transport.tls import Tls

KEY_VARIABLE = "SYMBIOSIS_KEY"

KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        help=f"A file with the API key, for executors that ask for one; else {KEY_VARIABLE}.",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        help="PEM file of the authorities that a tls:// executor's certificate may come from.",
        show_default="the system's",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option("--tls-cert", help="PEM file of this client's own certificate, for mutual TLS."),
]
TlsKey = Annotated[
    Path | None,
    typer.Option("--tls-key", help="Its private key, if that is not in the same file."),
]


class Access(NamedTuple):
    """For `symbiosis.connect`."""

    key: str | None
    tls: Tls | None
    helper_key: str | None = None


def access(
    key_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    tls_key: Path | None,
    helper_key_file: Path | None = None,
) -> Access:
    """Raises SymbiosisError for a key file that holds no key."""
    from symbiosis.transport.tls import Tls

    if tls_key is not None and cert is None:
        raise typer.BadParameter("--tls-key goes with --tls-cert")
    tls = None if ca is None and cert is None else Tls(ca, cert, tls_key)
    key = os.environ.get(KEY_VARIABLE) or None if key_file is None else _key(key_file)
    return Access(key, tls, None if helper_key_file is None else _key(helper_key_file))


def _key(path: Path) -> str:
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SymbiosisError(f"cannot read the key in {path}: {error}") from None
    if not key or any(mark.isspace() for mark in key):
        raise SymbiosisError(f"{path} does not hold one key and nothing else")
    return key
