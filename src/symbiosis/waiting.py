"""How this process's OpenMP threads wait between two products: awake, or asleep.

Awake they answer the next product at once, and take a core from whoever else needs it. On two
cores that decides more than anything else: a lone decoder is twice as fast with threads that stay
awake, and four are six times as slow (decision 20). What is right changes while the process runs,
and OpenMP takes its setting only at the start; but libgomp, which torch's Linux wheels use, waits
short as soon as it manages more threads than there are cores. So threads that keep teams of their
own, and do nothing, put the others to sleep, and wake them by ending.

How long they stay awake is ``GOMP_SPINCOUNT``; with ``OMP_WAIT_POLICY=passive`` beside it, short
means not at all. No effect with another OpenMP, or where torch uses few of many cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

import torch

_lock = threading.Lock()
_end: threading.Event | None = None  # of the threads that keep the others asleep
_MOST_TEAMS = 8
_BRIEF_SPINS = 30_000
_SOFT = 1  # omp_pause_soft


def sleep_at_once(sleep: bool) -> None:
    """From now on threads that wait go to sleep at once, or stay awake for a while. For the whole
    process; from any thread."""
    global _end
    with _lock:
        if sleep and _end is None:
            _end = _keep_teams(_teams_needed())
        elif not sleep and _end is not None:
            _end.set()
            _end = None


def waits_briefly() -> bool:
    """Do this process's threads stay awake for a millisecond at most?"""
    spins = os.environ.get("GOMP_SPINCOUNT", "")
    return spins.isdecimal() and int(spins) <= _BRIEF_SPINS


def end_team() -> None:
    """End the team of the calling thread, which computes no more, or is about to fork: it would
    put those of others to sleep, and a child would wait for it. The next product makes another."""
    with contextlib.suppress(OSError, AttributeError):  # an OpenMP before 5, or none
        ctypes.CDLL(torch._C.__file__).omp_pause_resource_all(_SOFT)


def _teams_needed() -> int:
    """Beside the one of the thread that computes."""
    team = torch.get_num_threads()
    needed = len(os.sched_getaffinity(0)) // team
    return needed if team > 1 and needed <= _MOST_TEAMS else 0


def _keep_teams(count: int) -> threading.Event:
    """Returns what ends them."""
    end = threading.Event()
    for _ in range(count):
        begun = threading.Event()
        threading.Thread(target=_keep_a_team, args=(begun, end), daemon=True).start()
        begun.wait()
    return end


def _keep_a_team(begun: threading.Event, end: threading.Event) -> None:
    torch.zeros(1 << 17).add_(1)  # large enough for torch to share it out among threads
    begun.set()
    end.wait()


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _end, _lock
    _end, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
