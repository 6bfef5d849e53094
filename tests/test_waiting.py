"""Threads that wait asleep or awake, in a process that has some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from symbiosis.cli import console
from symbiosis.waiting import waits_briefly

COUNTED = """
import os, signal, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch
from symbiosis.waiting import end_team, sleep_at_once

def compute(): torch.zeros(1 << 17).add_(1)
def threads(): return len(os.listdir("/proc/self/task"))
def settled(wanted):
    for _ in range(500):
        if threads() == wanted: return
        time.sleep(0.01)
    sys.exit(f"{threads()} threads, not {wanted}")
def in_a_child(call):
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if call() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

in_a_child(lambda: True)  # OpenBLAS ends its threads before a fork
"""

COME_AND_GO = """
def fresh():
    alone = threads()
    sleep_at_once(False)
    sleep_at_once(True)
    return alone == 1

compute()
awake = threads()
for _ in range(3):
    sleep_at_once(True)
    sleep_at_once(True)
    settled(awake + int(sys.argv[1]))
    in_a_child(fresh)
    sleep_at_once(False)
    sleep_at_once(False)
    settled(awake)
print("as it should be")
"""

FORKS = """
def as_before():  # and not waiting for ever for a team that its parent has
    compute()
    return threads() == 2

for _ in range(2):
    compute()
    settled(2)
    end_team()
    end_team()
    settled(1)
    in_a_child(as_before)
print("as it should be")
"""

LOADS = """
from symbiosis import Executor
from tqdm import tqdm

tqdm.monitor_interval = 0  # the thread that watches bars
before = threads()
for model, lend in ((sys.argv[1], False), (sys.argv[2], False), (sys.argv[1], True)):
    with Executor.load(model, lend=lend) as executor:
        executor.digest.wait()
        settled(before)
print("as it should be")
"""

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def run(program: str, *arguments: str, threads: int = 2) -> None:
    found = subprocess.run(
        [sys.executable, "-c", COUNTED + program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.stdout == "as it should be\n", found.stderr


@two_cores
@pytest.mark.parametrize(("threads", "further"), [(2, 2), (1, 0)])
def test_teams_come_and_go(threads: int, further: int) -> None:
    """On two cores one more team of two puts threads to sleep; a single thread waits for none."""
    run(COME_AND_GO, str(further), threads=threads)


@two_cores
def test_a_team_is_ended_before_a_fork() -> None:
    run(FORKS)


@two_cores
def test_loading_leaves_no_team(tmp_path: Path) -> None:
    """It would put the executor's own to sleep. Loading computes where numbers are copied: of
    files in bf16, and of what is lent."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        tiny.llama(hidden_size=256).to(dtype).save_pretrained(tmp_path / name)
    run(LOADS, str(tmp_path / "fp32"), str(tmp_path / "bf16"))


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
