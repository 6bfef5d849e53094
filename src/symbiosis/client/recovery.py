"""Carrying on after a lost connection: wait, ask again, give up when patience is at an end.

An exchange is a pure function of what is sent, so that asking again is always right. Knows
errors, time and chance; what is asked is the caller's business.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from symbiosis.errors import ConnectionFailed, ConnectionLost, DamagedFrame, ProtocolError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
_MOST_PROTOCOL_ERRORS = 3
"""In a row, apart from damaged frames: a repeated or torn stream passes, a mistake in one of the
programs comes every time."""

_chance = random.SystemRandom()
"""Not the generator that jobs seed: a lost connection must not change what is drawn next."""

Wait = Callable[[float], bool]
"""Wait so many seconds; true if the session was closed meanwhile."""


def recover(
    lost: BaseException, again: Callable[[], T], url: str, patience_s: float, wait: Wait
) -> T:
    """What ``again`` returns, tried until ``patience_s`` have passed since now.

    ``lost`` is what the first try raised, in whose handler this is called; it is raised again at
    once unless the connection failed. Only a lost, damaged or refused connection is tried again:
    what an executor answered stays its answer, and an interruption an interruption.
    """
    if not _may_pass(lost) or patience_s <= 0:
        raise lost
    logger.warning("%s; trying again for up to %g s", lost, patience_s)
    began_s, broken = time.monotonic(), 0
    for tries, delay_s in enumerate(_delays_s(), 1):
        mistaken = isinstance(lost, ProtocolError) and not isinstance(lost, DamagedFrame)
        broken = broken + 1 if mistaken else 0
        left_s = began_s + patience_s - time.monotonic()
        if broken >= _MOST_PROTOCOL_ERRORS or left_s <= 0 or wait(min(delay_s, left_s)):
            break
        try:
            found = again()
        except (ConnectionLost, ConnectionFailed, ProtocolError) as error:
            lost = error
            continue
        waited_s = time.monotonic() - began_s
        logger.warning("%s is back after %.1f s (try %d); nothing was lost", url, waited_s, tries)
        return found
    raise lost


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, (ConnectionLost, ConnectionFailed, ProtocolError))


def _delays_s() -> Iterator[float]:
    """Twice as long each time, and each at random from half of it up, so that the clients of one
    executor do not all come back at the same moment."""
    delay_s = _FIRST_DELAY_S
    while True:
        yield delay_s * _chance.uniform(0.5, 1.0)
        delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
