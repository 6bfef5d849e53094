"""`connect`: the one door into an executor, wherever it runs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from symbiosis.client.session import PriorityName, Session
from symbiosis.transport.sockets import Address, SocketChannel

if TYPE_CHECKING:
    from symbiosis.executor.executor import Executor


def connect(
    base: str | Executor,
    *,
    name: str | None = None,
    priority: PriorityName = "auto",
    weight: float = 1.0,
    deadline_ms: float | None = None,
    timeout_s: float = 10.0,
    arena_bytes: int = 4 << 30,
    privacy: Mode | Privacy | None = None,
) -> Session:
    """Open a session with the executor at ``base``.

    ``base`` is ``unix:///path.sock``, ``tcp://host:port``, or an `Executor` of this process.
    ``name`` is what ``symbiosis status`` shows. ``priority`` says whether a person waits for the
    answers (``interactive``) or a training loop does (``training``); ``auto`` decides for each
    exchange by whether gradients are recorded. Among clients of one priority, this one's turn
    comes as if it had waited ``weight`` times as long (0.1 to 10). The executor holds none of its
    exchanges for others beyond ``deadline_ms`` after arrival (0: never holds them).
    ``timeout_s`` bounds connecting. ``arena_bytes`` is the address space that is shared with an
    executor behind a UNIX socket, for large tensors; memory is taken as it is used, and 0 sends
    everything through the socket. ``privacy`` hides what is sent from whoever runs the executor:
    ``plain`` (nothing is hidden), ``masked-local``, or a `symbiosis.Privacy` that says more;
    `Session.privacy_report` says what that promises.

    Raises ConnectionFailed, ProtocolError, PrivacyError.
    """
    chosen = Privacy.of(privacy)
    if not isinstance(base, str):
        return Session(
            base.open_channel,
            "inproc",
            name=name,
            priority=priority,
            weight=weight,
            deadline_ms=deadline_ms,
        )
    url = str(Address.parse(base))
    opener = functools.partial(SocketChannel, url, timeout_s=timeout_s, arena_bytes=arena_bytes)
    return Session(
        opener, url, name=name, priority=priority, weight=weight, deadline_ms=deadline_ms
    )
