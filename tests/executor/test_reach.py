"""What other machines can reach must be encrypted and ask who they are."""

from __future__ import annotations

import pytest

from symbiosis.errors import ConnectionFailed
from symbiosis.executor.guard import check_reach
from symbiosis.transport.addresses import Address


@pytest.mark.parametrize(
    ("url", "asks", "allow_remote", "complaint"),
    [
        ("tcp://127.0.0.1:1", False, False, None),
        ("tls://localhost:1", False, False, None),
        ("unix:///tmp/x.sock", False, False, None),
        ("tcp://0.0.0.0:1", True, False, "is not encrypted"),
        ("tcp://0.0.0.0:1", False, False, "is not encrypted"),
        ("tls://0.0.0.0:1", False, False, "asks nobody who they are"),
        ("tls://[::]:1", False, False, "asks nobody who they are"),
        ("tls://0.0.0.0:1", True, False, None),
        ("tcp://0.0.0.0:1", False, True, None),
    ],
)
def test_reach(url: str, asks: bool, allow_remote: bool, complaint: str | None) -> None:
    addresses = [Address.parse("unix:///tmp/y.sock"), Address.parse(url)]
    if complaint is None:
        check_reach(addresses, asks, allow_remote)
    else:
        with pytest.raises(ConnectionFailed, match=f"{complaint}.*--tls-cert"):
            check_reach(addresses, asks, allow_remote)
