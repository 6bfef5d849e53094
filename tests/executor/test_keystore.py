"""The key store's file: made safely, read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from symbiosis.errors import KeyStoreError
from symbiosis.executor import keystore


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    path.chmod(0o600)
    return path


def test_a_key_is_found_again_and_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret, key = keystore.create(path, "ann")
    other, _ = keystore.create(path, "ann")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    assert len(secret) >= 43 and secret != other
    store = keystore.read(path)
    assert store.find(secret) == key and key.tenant == "ann"
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert store.find(secret + "x") is store.find("") is store.find("\ud800") is None


def test_a_key_can_be_revoked_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, key = keystore.create(path, "ann")
    second, _ = keystore.create(path, "ann")
    assert keystore.revoke(path, key.id) == key
    store = keystore.read(path)
    assert store.find(first) is None and store.find(second) is not None
    with pytest.raises(KeyStoreError, match="no key 'nonsense'"):
        keystore.revoke(path, "nonsense")


def test_what_the_operator_wrote_is_kept(tmp_path: Path) -> None:
    tenants = {
        "ann": {"max_sessions": 4, "rows_per_s": 10.5, "burst_rows": 100, "fetch": "deny"},
        "bob": {"share": 2.0, "requests": ["files", "parameters"], "executor_s_per_hour": 60},
        "eve": {},
    }
    path = write(tmp_path / "keys.json", {"tenants": tenants})
    keystore.create(path, "bob", datetime.now(UTC) + timedelta(days=1))
    assert json.loads(path.read_text())["tenants"] == tenants
    assert keystore.read(path).tenants["bob"].quota.executor_s_per_hour == 60


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secrets: list[str] = []
    makers = [
        threading.Thread(target=lambda: secrets.append(keystore.create(path, "ann")[0]))
        for _ in range(12)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    store = keystore.read(path)
    assert len(secrets) == 12 and all(store.find(secret) for secret in secrets)
    assert os.listdir(tmp_path) == ["keys.json"]


def test_an_end(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    secret, _ = keystore.create(tmp_path / "k", "ann", now + timedelta(hours=1))
    key = keystore.read(tmp_path / "k").find(secret)
    assert key is not None
    assert key.is_valid(now) and not key.is_valid(now + timedelta(hours=2))


KEY = {"id": "1", "tenant": "ann", "sha256": "0" * 64, "created": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("{", "Expecting"),
        ([], "not a JSON object"),
        ({"tenant": {}}, "no field 'tenant'; did you mean 'tenants'"),
        ({"tenants": {"ann": {"max_sesions": 1}}}, "did you mean 'max_sessions'"),
        ({"tenants": {"ann": {"max_sessions": 0}}}, "a whole number above 0"),
        ({"tenants": {"ann": {"max_sessions": 1.5}}}, "a whole number above 0"),
        ({"tenants": {"ann": {"max_sessions": True}}}, "a whole number above 0"),
        (
            {"tenants": {"ann": {"executor_s_per_hour": 10**400}}},
            "is a number of many digits; write",
        ),
        ({"tenants": {"ann": {"rows_per_s": 1e-320}}}, "is 1e-320; write 1e-12 to 1e\\+18"),
        ({"tenants": {"ann": {"rows_per_s": "10"}}}, "ann: rows_per_s is '10'"),
        ('{"tenants": {"ann": {"rows_per_s": NaN}}}', "rows_per_s is nan"),
        ('{"tenants": {"ann": {"share": Infinity}}}', "share is inf"),
        ({"tenants": {"ann": {"share": -1}}}, "share is -1"),
        ({"tenants": {"ann": {"burst_rows": 5}}}, "nothing without rows_per_s"),
        ({"tenants": {"ann": {"fetch": "perhaps"}}}, "write allow or deny"),
        ({"tenants": {"ann": {"requests": ["weights"]}}}, "choose from stats, files, parameters"),
        ({"tenants": {"": {}}}, "no name for a tenant"),
        ({"tenants": {"a\nb": {}}}, "no name for a tenant"),
        ({"keys": [KEY]}, "'ann', who is not among the tenants"),
        ({"tenants": {"ann": {}}, "keys": [KEY, KEY]}, "two keys have the same id"),
        ({"tenants": {"ann": {}}, "keys": [{**KEY, "sha256": "xyz"}]}, "64 hexadecimal digits"),
        ({"tenants": {"ann": {}}, "keys": [{**KEY, "expires": "2026-01-01"}]}, "offset from UTC"),
        ({"tenants": {"ann": {}}, "keys": [{**KEY, "expires": "soon"}]}, "malformed"),
        ({"tenants": {"ann": {}}, "keys": {}}, "keys is not a list"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, value: object, complaint: str) -> None:
    path = write(tmp_path / "keys.json", value)
    with pytest.raises(KeyStoreError, match=complaint) as caught:
        keystore.read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keystore.create(path, "ann")
    path.chmod(0o640)
    with pytest.raises(KeyStoreError, match="chmod 600"):
        keystore.read(path)
    with pytest.raises(KeyStoreError, match=r"cannot read the key store .*No such file"):
        keystore.read(tmp_path / "none.json")
    with pytest.raises(KeyStoreError, match="cannot write"):
        keystore.create(tmp_path / "no" / "folder" / "k.json", "ann")
    with pytest.raises(KeyStoreError, match="no name for a tenant"):
        keystore.create(path, "")
