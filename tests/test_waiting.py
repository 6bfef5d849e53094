"""Threads that wait asleep or awake, in a process that has some."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, torch
from symbiosis.waiting import sleep_at_once

def threads(): return len(os.listdir("/proc/self/task"))
def settled(wanted):
    import time
    for _ in range(500):
        if threads() == wanted: return
        time.sleep(0.01)
    sys.exit(f"{threads()} threads, not {wanted}")

if not os.fork():
    os._exit(0)
os.wait()  # OpenBLAS ends its threads before a fork
team = torch.get_num_threads()
teams = len(os.sched_getaffinity(0)) // team
torch.zeros(1 << 17).add_(1)
awake = threads()
for _ in range(3):
    sleep_at_once(True)
    sleep_at_once(True)
    settled(awake + teams * team)
    child = os.fork()
    if not child:
        alone = threads()
        sleep_at_once(False)
        sleep_at_once(True)
        os._exit(0 if alone == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sleep_at_once(False)
    sleep_at_once(False)
    settled(awake)
print("as it should be")
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_teams_come_and_go() -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout == "as it should be\n", found.stderr


def test_one_thread_needs_none() -> None:
    program = PROGRAM.replace("teams * team", "0")
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout == "as it should be\n", found.stderr
