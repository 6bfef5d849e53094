"""The file of keys and tenants: reading it strictly, writing it safely. Knows no sockets.

One JSON object::

    {
      "tenants": {"ann": {"max_sessions": 4, "rows_per_s": 2000, "fetch": "deny"}, "bob": {}},
      "keys": [{"id": "3f9c02ab", "tenant": "ann", "sha256": "…", "created": "…", "expires": null}]
    }

A key is 32 random bytes and is shown once, when it is made; the file holds its SHA-256. A slow
hash protects what can be guessed, such as passwords; of 2²⁵⁶ keys none can, however fast the
guesses are. Unknown fields are errors: a limit with a typing error must not be no limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from symbiosis.errors import KeyStoreError
from symbiosis.executor.tenants import NO_LIMITS, Quota

FetchPolicy = Literal["allow", "deny"]
REQUESTS = ("stats", "files", "parameters", "digest", "ring")
"""What a tenant may be allowed to ask, besides whole weights, which ``fetch`` governs."""

_PREFIX = "symbiosis-"
_TENANT_FIELDS = (*Quota._fields, "share", "fetch", "requests")
_KEY_FIELDS = ("id", "tenant", "sha256", "created", "expires")
_LEAST, _MOST = 1e-12, 1e18


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Who shares the executor with others, and on which terms."""

    name: str
    quota: Quota = NO_LIMITS
    share: float = 1.0
    """Of the executor's time, against the other tenants' shares, while all want it."""
    fetch: FetchPolicy | None = None
    """Whether it may read whole weights; None: as the executor does by default."""
    requests: frozenset[str] = frozenset(REQUESTS)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key, without the key."""

    id: str
    tenant: str
    sha256: str
    created: datetime
    expires: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        return self.expires is None or now < self.expires


@dataclasses.dataclass(frozen=True)
class Store:
    """What the file says."""

    tenants: Mapping[str, Tenant]
    keys: tuple[Key, ...] = ()

    def find(self, presented: str) -> Key | None:
        """The key that was presented, valid or not. Takes the same time for every answer."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).hexdigest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def read(path: Path) -> Store:
    """Raises KeyStoreError that names the file and what is wrong in it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_bytes()
    except OSError as error:
        raise KeyStoreError(
            f"cannot read the key store {path} ({error.strerror}); `symbiosis keys create TENANT "
            f"--store {path}` makes one"
        ) from None
    if mode & 0o077:
        raise KeyStoreError(f"{path} can be read or changed by others: chmod 600 {path}")
    try:
        return _store(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise KeyStoreError(f"the key store {path} is malformed: {error}") from None


def create(path: Path, tenant: str, expires: datetime | None = None) -> tuple[str, Key]:
    """A new key for ``tenant``, who is added if need be; the key itself, and what is kept of it.

    Makes the file if there is none. Raises KeyStoreError.
    """
    try:
        _name(tenant)
    except ValueError as error:
        raise KeyStoreError(str(error)) from None
    secret = _PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    now = datetime.now(UTC).replace(microsecond=0)
    key = Key(secrets.token_hex(4), tenant, digest, now, expires)
    with _changing(path) as store:
        tenants = (
            {**store.tenants}
            if tenant in store.tenants
            else {**store.tenants, tenant: Tenant(tenant)}
        )
        _write(path, Store(tenants, (*store.keys, key)))
    return secret, key


def revoke(path: Path, key_id: str) -> Key:
    """Take a key out of the file. Raises KeyStoreError if it has none of that id."""
    with _changing(path) as store:
        kept = tuple(key for key in store.keys if key.id != key_id)
        if len(kept) == len(store.keys):
            raise KeyStoreError(f"{path} has no key {key_id!r}; `symbiosis keys list` shows them")
        _write(path, Store(store.tenants, kept))
    return next(key for key in store.keys if key.id == key_id)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Store]:
    """The store, for one writer at a time: its folder is locked meanwhile."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield read(path) if path.exists() else Store({})
    finally:
        os.close(folder)


def _write(path: Path, store: Store) -> None:
    """All or nothing, readable by the owner alone from the first byte on (mkstemp)."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with open(descriptor, "w") as file:
            json.dump(_plain(store), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        raise KeyStoreError(f"cannot write {path}: {error.strerror}") from None


def _plain(store: Store) -> dict[str, object]:
    return {
        "tenants": {name: _plain_tenant(tenant) for name, tenant in store.tenants.items()},
        "keys": [
            {
                **dataclasses.asdict(key),
                "created": key.created.isoformat(),
                "expires": key.expires and key.expires.isoformat(),
            }
            for key in store.keys
        ],
    }


def _plain_tenant(tenant: Tenant) -> dict[str, object]:
    """Only what differs from the defaults."""
    fields: dict[str, object] = {
        name: limit for name, limit in tenant.quota._asdict().items() if limit is not None
    }
    if tenant.share != 1.0:
        fields["share"] = tenant.share
    if tenant.fetch is not None:
        fields["fetch"] = tenant.fetch
    if tenant.requests != frozenset(REQUESTS):
        fields["requests"] = sorted(tenant.requests)
    return fields


def _store(value: object) -> Store:
    fields = _fields(value, "the file", ("tenants", "keys"))
    entries = _mapping(fields.get("tenants", {}), "tenants")
    tenants = {_name(name): _tenant(name, entry) for name, entry in entries.items()}
    listed = fields.get("keys", [])
    if not isinstance(listed, list):
        raise ValueError("keys is not a list")
    keys = tuple(_key(entry, tenants) for entry in listed)
    if len({key.id for key in keys}) != len(keys):
        raise ValueError("two keys have the same id")
    return Store(tenants, keys)


def _name(name: str) -> str:
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise ValueError(f"{name!r} is no name for a tenant: 1 to 64 printable characters")
    return name


def _tenant(name: str, value: object) -> Tenant:
    where = f"tenant {name}"
    fields = _fields(value, where, _TENANT_FIELDS)
    limits = {}
    for limit in Quota._fields:
        if (given := fields.get(limit)) is not None:
            whole = limit.startswith("max_")
            limits[limit] = _number(given, f"{where}: {limit}", whole)
    if "burst_rows" in limits and "rows_per_s" not in limits:
        raise ValueError(f"{where}: burst_rows says nothing without rows_per_s")
    fetch = fields.get("fetch")
    if fetch not in (None, "allow", "deny"):
        raise ValueError(f"{where}: fetch is {fetch!r}; write allow or deny")
    asked = fields.get("requests", list(REQUESTS))
    if not isinstance(asked, list) or any(request not in REQUESTS for request in asked):
        raise ValueError(f"{where}: requests is {asked!r}; choose from {', '.join(REQUESTS)}")
    share = _number(fields.get("share", 1.0), f"{where}: share", False)
    return Tenant(name, Quota(**limits), share, fetch, frozenset(asked))  # type: ignore[arg-type]


def _key(value: object, tenants: Mapping[str, Tenant]) -> Key:
    fields = _fields(value, "a key", _KEY_FIELDS)
    id, tenant, digest = (_text(fields.get(name), f"a key's {name}") for name in _KEY_FIELDS[:3])
    if tenant not in tenants:
        raise ValueError(f"key {id} belongs to {tenant!r}, who is not among the tenants")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"key {id}: sha256 is not 64 hexadecimal digits")
    expires = fields.get("expires")
    created = _time(fields.get("created"), f"key {id}: created")
    return Key(
        id,
        tenant,
        digest,
        created,
        None if expires is None else _time(expires, f"key {id}: expires"),
    )


def _fields(value: object, where: str, known: tuple[str, ...]) -> Mapping[str, object]:
    fields = _mapping(value, where)
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no field {name!r}{hint}")
    return fields


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is {value!r}, not text")
    return value


def _number(value: object, where: str, whole: bool) -> float:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        raise ValueError(f"{where} is {value!r}; it must be a {'whole ' * whole}number above 0")
    if not _LEAST <= value <= _MOST:  # what is reckoned with it stays finite
        given = value if isinstance(value, float) else "a number of many digits"
        raise ValueError(f"{where} is {given}; write {_LEAST:g} to {_MOST:g}")
    return value


def _time(value: object, where: str) -> datetime:
    found = datetime.fromisoformat(_text(value, where))
    if found.tzinfo is None:
        raise ValueError(f"{where} is {value!r}; add its offset from UTC, as in …+00:00")
    return found
