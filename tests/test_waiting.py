"""Threads that wait asleep or awake, in a process that has some."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from symbiosis.cli import console
from symbiosis.waiting import waits_briefly

PROGRAM = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch
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
torch.zeros(1 << 17).add_(1)
awake = threads()
for _ in range(3):
    sleep_at_once(True)
    sleep_at_once(True)
    settled(awake + int(sys.argv[1]))
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
@pytest.mark.parametrize(("threads", "further"), [(2, 2), (1, 0)])
def test_teams_come_and_go(threads: int, further: int) -> None:
    """On two cores one more team of two puts threads to sleep; a single thread waits for none."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(further)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout == "as it should be\n", found.stderr


@pytest.mark.parametrize("command", ["finetune", "generate", "serve", None])
def test_a_trainer_s_threads_wait_briefly(
    command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    console.share_cores(command)
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert waits_briefly() is (command == "finetune")
