"""The script that measures a GPU, run whole on its stand-in, the CPU with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def test_every_part_runs_on_the_stand_in(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--stand-in", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    for place in ("in process", "unix", "tcp"):
        assert found["check"][place] == {"largest_difference": 0, "same_tokens": True}
    for place in ("in process", "processes"):
        assert all(found["exchange"][place][size] > 0 for size in ("8 KB", "1 MB"))
    assert found["exchange"]["with MPS"] == "no MPS here"
    assert found["jobs"]["jobs_that_fit"] > found["jobs"]["separate_that_fit"] > 0
    assert found["many"]["adapters"] == 3
    assert found["many"]["tokens_per_s"] > 0
    assert found["decode"]["2 clients"] > 0
    assert found["context"]["64: client in host memory"] > 0
    assert found["context"]["64: client in host memory, limit"] > 0
    assert all(limit > 0 for limit in found["exchange"]["limits_s"]["1 MB"].values())
    assert all(found["lent"]["2 processes"][kind] > 0 for kind in ("training", "decoding"))


def test_without_a_gpu_it_says_what_to_do() -> None:
    command = [sys.executable, SCRIPT, "--device", "cuda"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert "--device cpu --stand-in" in done.stderr
