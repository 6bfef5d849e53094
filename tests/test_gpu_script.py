"""The script that measures a GPU, run whole on its stand-in, the CPU with tiny models."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu" / "run.py"


def test_every_part_runs_on_the_stand_in(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--stand-in", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    for place in ("in process", "unix", "unix, host memory", "tcp"):
        assert found["check"][place] == {"largest_difference": 0, "same_tokens": True}
    for place in ("in process", "processes", "through the host"):
        assert all(found["exchange"][place][size] > 0 for size in ("8 KB", "1 MB"))
    assert found["exchange"]["with MPS"] == "no MPS here"
    assert found["jobs"]["jobs_that_fit"] > found["jobs"]["separate_that_fit"] > 0
    assert found["many"]["adapters"] == found["many"]["asked_for"] == 3
    assert found["many"]["tokens_per_s"] > 0
    assert found["decode"]["2 clients"] > 0
    assert found["context"]["64: client in host memory"] > 0
    assert found["context"]["64: client in host memory, limit"] > 0
    assert all(limit > 0 for limit in found["exchange"]["limits_s"]["1 MB"].values())
    assert all(found["lent"]["2 processes"][kind] > 0 for kind in ("training", "decoding"))
    assert found["lent"]["with MPS"] == "no MPS here"

    again = subprocess.run([*command, "--only", "context"], capture_output=True, timeout=120)
    assert again.returncode == 0
    added = json.loads(out.read_text())
    assert added["many"] == found["many"]
    assert added["context"] != found["context"]

    out.write_text(json.dumps({**found, "device": "another"}))
    refused = subprocess.run(
        [*command, "--only", "context"], capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2
    assert "give another --out" in refused.stderr


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules[spec.name]


def test_what_was_measured_is_written_before_the_next_part(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit may end the call at any moment."""
    out = tmp_path / "gpu.json"

    def ends(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Bench, "check", lambda self: {"same": True})
    monkeypatch.setattr(script.Bench, "exchange", ends)
    monkeypatch.setattr(script.Bench, "describe", lambda self: {"device": "none"})
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--stand-in", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert json.loads(out.read_text())["check"]["same"] is True


def test_an_mps_that_fails_costs_its_own_figure_only(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[bool]:
        raise subprocess.CalledProcessError(1, "nvidia-cuda-mps-control")
        yield True

    monkeypatch.setattr(script, "_mps", broken)
    assert "failed: " in script._with_mps(dict)


def test_a_job_leaves_the_base_as_it_was(script: ModuleType) -> None:
    bench = script.Bench("cpu", script.stand_in_sizes())
    base = bench.made(bench.sizes.llama)
    job = script.Job(base, bench)
    assert job.step() > 0
    job.end()
    assert not any(module._forward_hooks for module in base.modules())
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_how_many_jobs_fit_is_by_what_one_more_takes(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script.Bench("cpu", script.stand_in_sizes())
    monkeypatch.setattr(script.Bench, "available", lambda self: 80 << 30)
    fit = bench._fit((1, 53 << 30), (2, 55 << 30))
    assert (fit.fixed, fit.job, fit.count) == (51 << 30, 2 << 30, 12)
    assert str(fit) == "(0.95 · 80.0 GiB - 51.0) / 2.000 = 12"


def test_without_a_gpu_it_says_what_to_do() -> None:
    command = [sys.executable, SCRIPT, "--device", "cuda"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert "--device cpu --stand-in" in done.stderr
