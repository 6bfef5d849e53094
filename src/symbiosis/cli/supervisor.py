"""Keeping a server alive: a parent that forks it, and forks it again when it dies.

The parent holds what is expensive (the imports, the weights, the listening sockets) and does
nothing with it, so that a new child is there within milliseconds, with the very same numbers in
the very same memory, and clients that connect meanwhile wait in the sockets' queues. It must have
no threads of OpenMP's left, for they do not survive a fork (`symbiosis.waiting.end_team`). Knows
processes and signals; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from symbiosis.cli import console
from symbiosis.errors import SymbiosisError

logger = logging.getLogger(__name__)

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MOST_FALSE_STARTS = 5
_PAUSE_S = 0.05
_PR_SET_PDEATHSIG = 1

Work = Callable[[Callable[[], None], bool], None]
"""The child's work: it calls its first argument when it is ready; the second says whether a child
has been ready before. SIGTERM raises SystemExit in it."""


class Supervisor:
    """Runs ``work`` in a child, again and again until told to stop. For the main thread."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._child = 0
        self._stopping = False
        self._served = False

    def run(self) -> int:
        """The exit code: 0 after a stop in order, the child's own if it fails before it is ready.

        SIGTERM, SIGINT and SIGHUP reach the child as SIGTERM; a second one kills it. Raises
        SymbiosisError if the child is killed again and again before it is ready.
        """
        for number in _STOPPING:
            signal.signal(number, self._stop)
        gc.collect()
        gc.freeze()  # collections in the child would write to, and so copy, the parent's memory
        false_starts = 0
        while True:
            began_s = time.monotonic()
            pid, ready = self._fork()
            _, status = os.waitpid(pid, 0)
            self._child = 0
            code, was_ready = os.waitstatus_to_exitcode(status), os.read(ready, 1) == b"1"
            os.close(ready)
            if self._stopping:
                return max(code, 0)
            if code > 0 and not was_ready:
                return code  # it has said why, and would say so again
            self._served = self._served or was_ready
            false_starts = 0 if was_ready else false_starts + 1
            how = _ended(code)
            if false_starts == _MOST_FALSE_STARTS:
                raise SymbiosisError(
                    f"the executor {how} {false_starts} times in a row before it was ready; "
                    f"if it was the system's out-of-memory killer, the model is too large"
                )
            logger.warning(
                "the executor (process %d) %s after %.1f s; starting it again",
                pid, how, time.monotonic() - began_s,
            )  # fmt: skip
            if self._told_during(_PAUSE_S * (1 << 2 * false_starts)):
                return 0

    def _fork(self) -> tuple[int, int]:
        """The child's number, and the pipe in which it says that it is ready."""
        ready, tell = os.pipe()
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            os.close(ready)
            self._be_child(parent, tell)
        self._child = pid
        os.close(tell)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        if self._stopping:  # told while there was no child
            os.kill(pid, signal.SIGTERM)
        return pid, ready

    def _told_during(self, pause_s: float) -> bool:
        """Rest, and hear at once when told to stop: a sleep would go on after the signal."""
        until_s = time.monotonic() + pause_s
        while not self._stopping and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.1))
        return self._stopping

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self._stopping = self._stopping, True
        if self._child:
            os.kill(self._child, signal.SIGKILL if again else signal.SIGTERM)

    def _be_child(self, parent: int, tell: int) -> NoReturn:
        """Work, and leave without what the parent has registered for its own end."""
        code = 70
        try:
            signal.signal(signal.SIGTERM, _leave)
            for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C reaches both: the parent tells
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
            _end_with(parent)
            self._work(lambda: _write(tell), self._served)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0
        except (SymbiosisError, OSError) as error:
            code = console.fail(error)
        except BaseException:  # noqa: BLE001 (nothing of the parent's may run in here)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough; the parent kills who does not hear
    raise SystemExit(0)


def _write(tell: int) -> None:
    os.write(tell, b"1")


def _end_with(parent: int) -> None:
    """A parent that is killed takes the child along, in order; only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(0)


def _ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"
