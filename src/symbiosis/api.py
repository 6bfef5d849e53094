"""`connect`: the one door into an executor, wherever it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from symbiosis.client.private import PrivateSession
from symbiosis.client.session import Opener, PriorityName, Session
from symbiosis.client.verifying import Trust
from symbiosis.errors import PrivacyError
from symbiosis.privacy.modes import Mode, Privacy
from symbiosis.transport.addresses import Address
from symbiosis.transport.channel import Channel
from symbiosis.transport.sockets import SocketChannel
from symbiosis.transport.tls import Secret, Tls

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
    retry_s: float = 60.0,
    silence_s: float | None = None,
    arena_bytes: int = 4 << 30,
    borrow: bool = True,
    key: str | None = None,
    tls: Tls | None = None,
    expect_digest: str | None = None,
    verify: float = 0.0,
    weights: str | None = None,
    privacy: Mode | Privacy | None = None,
    helper_key: str | None = None,
    helper_tls: Tls | None = None,
) -> Session:
    """Open a session with the executor at ``base``.

    ``base`` is ``unix:///path.sock``, ``tcp://host:port``, ``tls://host:port``, or an `Executor`
    of this process. ``name`` is what ``symbiosis status`` shows. ``priority`` says whether a
    person waits for the answers (``interactive``) or a training loop does (``training``);
    ``auto`` decides for each exchange by whether gradients are recorded. Among clients of one
    priority, this one's turn comes as if it had waited ``weight`` times as long (0.1 to 10). The
    executor holds none of its exchanges for others beyond ``deadline_ms`` after arrival (0: never
    holds them).
    ``timeout_s`` bounds connecting.

    When the connection is lost in mid-session, it is opened anew for up to ``retry_s`` and what
    was under way is sent again: nothing is lost (0: raises ConnectionLost at once). A peer whose
    machine has gone is noticed within a minute; ``silence_s`` also bounds how long an executor
    that is there may say nothing in mid-exchange before the connection counts as lost (None: it
    may compute as long as it likes). ``arena_bytes`` is the address space that is shared with an
    executor behind a UNIX socket, for large tensors; memory is taken as it is used, and 0 sends
    everything through the socket. ``borrow`` takes the weights that such an executor lends
    (``symbiosis serve --lend``), where they are on the model's device, and computes with them here;
    not with ``verify`` or ``privacy``.
    ``key`` is an API key, for executors that ask for one; it is
    sent over tls:// or within the host only, and goes along when a session is pickled for a
    worker process. ``tls`` says what to trust and show at a tls:// address; by default the
    system's authorities are trusted. The hostname is always verified.

    ``expect_digest`` pins the model: what ``symbiosis digest FOLDER`` prints. An executor that
    claims another is left before anything is sent, and every file, small parameter and fetched
    weight that arrives is compared; not what a model computes when it is built (rotary
    frequencies). ``verify`` is the share of the exchanges (0.05: one in twenty) whose products
    are checked by random projections; a wrong one raises IntegrityError and ends the session. By
    itself that finds an executor that computes wrongly or changes its weights; with ``weights``,
    a folder with the model that you trust, also one that computes with others from the start, or
    ships other frequencies. See decision 15 for what each finds.

    ``privacy`` hides what is sent from whoever runs the executor: ``plain`` (nothing is hidden),
    ``masked-local``, or a `symbiosis.Privacy` that says more; `Session.privacy_report` says what
    that promises. ``helper_key`` and ``helper_tls`` are for a helper that it names what ``key`` and
    ``tls`` are for the executor, which never go there; by default the helper's certificate may come
    from ``tls.ca`` too. Beyond the host a helper must be at tls://, for it is told the masks' keys.

    A client on the executor's host shares its cores: from now on this process's OpenMP threads
    sleep while they wait, or stay awake where nobody else is at work and it trains, or borrows; see
    `symbiosis.waiting`.

    Raises ConnectionFailed, AuthenticationFailed, QuotaExceeded, ProtocolError, ModelError,
    PrivacyError.
    """
    trust = Trust.of(expect_digest, verify, weights)
    chosen = Privacy.of(privacy)
    if chosen.helper is None and (helper_key is not None or helper_tls is not None):
        raise ValueError("helper_key= and helper_tls= are for the helper of masked-split: name one")
    dial = functools.partial(
        SocketChannel,
        timeout_s=timeout_s,
        silence_s=silence_s,
        arena_bytes=arena_bytes,
        borrow=borrow and chosen.is_plain and not trust.verify,
    )
    make: Callable[..., Session] = Session
    if not chosen.is_plain:
        helper = None
        if chosen.helper is not None:
            address = Address.parse(chosen.helper)
            chosen = replace(chosen, helper=str(address))
            helper = _helper(dial, address, tls, helper_key, helper_tls)
        make = functools.partial(PrivateSession, privacy=chosen, helper=helper)
    opener: Opener
    is_beside = False
    if isinstance(base, str):
        address = Address.parse(base)
        url = str(address)
        is_beside = address.is_loopback
        secret = None if key is None else Secret(key)
        opener = functools.partial(dial, url, key=secret, tls=tls)
    else:
        url, opener = "inproc", base.open_channel
    session = make(
        opener,
        url,
        name=name,
        priority=priority,
        weight=weight,
        deadline_ms=deadline_ms,
        retry_s=retry_s,
        trust=trust,
    )
    if is_beside:
        session.share_cores()
    return session


def _helper(
    dial: Callable[..., Channel],
    address: Address,
    tls: Tls | None,
    helper_key: str | None,
    helper_tls: Tls | None,
) -> Opener:
    """Opens channels to another operator's executor, who is told nothing that is meant for the
    first one's. Raises PrivacyError where the keys of masks could be read on the way."""
    if not address.is_tls and not address.is_loopback:
        raise PrivacyError(
            f"the keys of the masks are not sent to {address}, where everybody on the way could "
            f"read them and take the masks off: use a helper at tls://{address.host}:{address.port}"
        )
    if helper_tls is None and tls is not None and address.is_tls:
        helper_tls = Tls(ca=tls.ca)
    secret = None if helper_key is None else Secret(helper_key)
    return functools.partial(dial, str(address), key=secret, tls=helper_tls)
