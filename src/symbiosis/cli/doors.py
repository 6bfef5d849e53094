"""Where `symbiosis serve` listens, and on which terms; checked before anything is loaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

if TYPE_CHECKING:
    from symbiosis.executor.executor import Executor
    from symbiosis.transport.addresses import Address
    from symbiosis.transport.tls import ServerTls


class Doors(NamedTuple):
    """What `Executor.listen` is given."""

    urls: list[str]
    tls: ServerTls | None
    allow_remote: bool
    admin: str | None

    def open(
        self, executor: Executor, inherited: Sequence[tuple[socket.socket, Address]] = ()
    ) -> list[str]:
        """The URLs with the ports really taken. Raises ConnectionFailed."""
        return executor.listen(
            self.urls,
            inherited,
            tls=self.tls,
            allow_remote=self.allow_remote,
            admin=self.admin,
        )


def server_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """Raises BadParameter for options that miss another."""
    from symbiosis.transport.tls import ServerTls

    if cert is None:
        if key is not None or client_ca is not None:
            raise typer.BadParameter("--tls-key and --tls-client-ca go with --tls-cert")
        return None
    return ServerTls(cert, key, client_ca)


def check(doors: Doors, keys: Path | None) -> None:
    """Find out before minutes are spent on loading. Raises ConnectionFailed, KeyStoreError."""
    from symbiosis.executor import keystore
    from symbiosis.executor.guard import admin_address, check_reach, context_for
    from symbiosis.transport.addresses import Address

    addresses = [Address.parse(url) for url in doors.urls]
    mutual = doors.tls is not None and doors.tls.client_ca is not None
    check_reach(addresses, keys is not None or mutual, doors.allow_remote)
    if keys is not None:
        keystore.read(keys)
    for address in addresses:
        context_for(address, doors.tls)
    if doors.admin is not None:
        addresses.append(admin_address(doors.admin))
    for address in addresses:
        _try(address)


def _try(address: Address) -> None:
    from symbiosis.transport.addresses import listen

    listener, _ = listen(address)
    listener.close()
    if address.path is not None:
        os.unlink(address.path)
