"""Who may come in: keys and certificates against the key store, and what each tenant may.

Lives in the server's thread. Knows the key store and the accounts; knows no sockets. Clients in
the executor's own process do not pass here: they could read its memory anyway.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from symbiosis.errors import AuthenticationFailed, ConnectionFailed, KeyStoreError
from symbiosis.executor import keystore
from symbiosis.executor.keystore import Tenant
from symbiosis.executor.tenants import Account
from symbiosis.transport.addresses import Address
from symbiosis.transport.tls import ServerTls

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often the key store's file is looked at, and keys for their end."""

_Stamp = tuple[int, int, int]


class Pass(NamedTuple):
    """Who a client has turned out to be."""

    tenant: Tenant
    key_id: str | None  # None: by certificate
    account: Account


class Guard:
    """Identifies clients, and knows when they have to go."""

    def __init__(
        self,
        path: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``path`` is the key store; None: whoever has a certificate that the listener's
        authority signed is a tenant of its own name, and other doors ask for nothing. Raises
        KeyStoreError."""
        self._path = path
        self._clock = clock
        self._wall_clock = wall_clock
        self._stamp = _stamp(path)
        self._store = None if path is None else keystore.read(path)
        self._passes: dict[int, Pass] = {}
        self._accounts: dict[str, Account] = {}
        self._look_at_s = clock() + LOOK_EVERY_S

    def identify(self, key: object, certificate: tuple[str, ...]) -> Pass | None:
        """Who presents this key (None: none), over a connection with these names in its
        certificate. None: nobody in particular, and nobody is asked for. Raises
        AuthenticationFailed."""
        if self._store is None:
            return self._pass(Tenant(certificate[0])) if certificate else None
        if key is None:
            for name in certificate:
                if name in self._store.tenants:
                    return self._pass(self._store.tenants[name])
            raise refusal()
        found = self._store.find(key) if isinstance(key, str) else None
        if found is None or not found.is_valid(self._now()):
            raise refusal()
        return self._pass(self._store.tenants[found.tenant], found.id)

    def enter(self, client: int, holder: Pass) -> None:
        """A client has been taken on; it has opened a session of its account already."""
        self._passes[client] = holder

    def leave(self, client: int) -> None:
        """A client has gone."""
        holder = self._passes.pop(client, None)
        if holder is not None:
            holder.account.close_session()

    def tenant_of(self, client: int) -> Tenant | None:
        """None for who is nobody in particular."""
        holder = self._passes.get(client)
        return None if holder is None else holder.tenant

    def reload(self) -> None:
        """Read the key store anew. Raises KeyStoreError, and the old one stays in force."""
        if self._path is None:
            return
        self._stamp = _stamp(self._path)
        self._store = store = keystore.read(self._path)
        now_s = self._clock()
        for name, account in self._accounts.items():
            if name in store.tenants:
                account.limit(store.tenants[name].quota, now_s)
                account.share = store.tenants[name].share  # in force from its next session on
        for client, holder in self._passes.items():
            tenant = store.tenants.get(holder.tenant.name, holder.tenant)
            self._passes[client] = holder._replace(tenant=tenant)

    def look(self) -> list[int]:
        """The clients that have to go, seldom any; call it at least every `LOOK_EVERY_S`."""
        now_s = self._clock()
        if now_s < self._look_at_s:
            return []
        self._look_at_s = now_s + LOOK_EVERY_S
        if _stamp(self._path) != self._stamp:
            try:
                self.reload()
                logger.info("the key store %s has changed and was read anew", self._path)
            except KeyStoreError as error:
                logger.error("%s; what it said before stays in force", error)
        return self.outdated()

    def outdated(self) -> list[int]:
        """The clients whose key has been revoked or has expired, or whose tenant is gone."""
        store = self._store
        if store is None:
            return []
        now = self._now()
        valid = {key.id for key in store.keys if key.is_valid(now)}
        return [
            client
            for client, (tenant, key_id, _) in self._passes.items()
            if tenant.name not in store.tenants or (key_id is not None and key_id not in valid)
        ]

    def accounts(self) -> dict[str, object]:
        """Every known tenant's use and limits, as plain JSON types."""
        names = [] if self._store is None else list(self._store.tenants)
        now_s = self._clock()
        known = dict.fromkeys([*names, *self._accounts])
        return {name: self._account(self._tenant(name)).snapshot(now_s) for name in known}

    def account_of(self, tenant: Tenant) -> dict[str, object]:
        """One tenant's use and limits."""
        return self._account(tenant).snapshot(self._clock())

    def _tenant(self, name: str) -> Tenant:
        found = None if self._store is None else self._store.tenants.get(name)
        return found or Tenant(name)

    def _pass(self, tenant: Tenant, key_id: str | None = None) -> Pass:
        return Pass(tenant, key_id, self._account(tenant))

    def _account(self, tenant: Tenant) -> Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            account = Account(tenant.name, tenant.quota, self._clock(), tenant.share)
            self._accounts[tenant.name] = account
        return account

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._wall_clock(), UTC)


def check_reach(addresses: Sequence[Address], asks: bool, allow_remote: bool) -> None:
    """Raises ConnectionFailed if other machines could come in unknown or be overheard.

    ``asks`` says whether clients have to show a key or a certificate.
    """
    for address in addresses:
        if address.is_loopback or allow_remote or (address.is_tls and asks):
            continue
        lacks = "asks nobody who they are" if address.is_tls else "is not encrypted"
        raise ConnectionFailed(
            f"{address} can be reached from other machines and {lacks}: listen on "
            f"tls://HOST:PORT with --tls-cert and --tls-key, and give --keys or "
            f"--tls-client-ca; or read `symbiosis serve --help` on --allow-remote"
        )


def admin_address(url: str) -> Address:
    """Raises ConnectionFailed for what is no UNIX socket."""
    address = Address.parse(url)
    if address.path is None:
        raise ConnectionFailed(f"administration goes over unix:///path.sock only, not {url}")
    return address


def context_for(address: Address, tls: ServerTls | None) -> ssl.SSLContext | None:
    """None for an address without TLS. Raises ConnectionFailed."""
    if not address.is_tls:
        return None
    if tls is None:
        raise ConnectionFailed(f"{address} needs a certificate: give --tls-cert and --tls-key")
    return tls.context()


def refusal() -> AuthenticationFailed:
    """The one sentence for every reason: which one it is would help whoever guesses."""
    return AuthenticationFailed(
        "this executor does not know you: give a valid key, as key=... to connect, --key-file or "
        "SYMBIOSIS_KEY, or a certificate that names a tenant; the operator makes keys with "
        "`symbiosis keys create`"
    )


def _stamp(path: Path | None) -> _Stamp | None:
    """Differs when the file has been replaced or written."""
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    return found and (found.st_ino, found.st_mtime_ns, found.st_size)
