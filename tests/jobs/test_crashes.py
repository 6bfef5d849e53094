"""Jobs that are killed, and disks that are full: what is left is whole, and the run goes on."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from symbiosis.errors import WriteFailed
from symbiosis.jobs import finetune
from symbiosis.jobs.record import Progress, RunFolder
from symbiosis.jobs.spec import FinetuneSpec

Make = Callable[..., FinetuneSpec]


@pytest.fixture
def make(base: str, train_file: Path, tmp_path: Path) -> Make:
    """A specification of a run with a checkpoint every other step; any field can be given."""
    defaults = {
        "base": base,
        "data": train_file,
        "out": tmp_path / "out",
        "options": {"lora_dropout": 0.1, "r": 4},
        "steps": 30,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "max_length": 64,
        "save_steps": 2,
        "seed": 5,
    }
    return lambda **fields: FinetuneSpec(**{**defaults, **fields})


def assert_same_adapter(first: Path, second: Path) -> None:
    """Bit for bit."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# kill -9


def job(spec: FinetuneSpec) -> None:
    torch.set_num_threads(1)
    finetune.run(spec)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that do not have to import everything first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["symbiosis.jobs.finetune", "symbiosis.jobs.training", "peft"])
    return context


def kill_within(process: ForkServerProcess, folder: RunFolder, chance: random.Random) -> None:
    """Some moment after it has made progress."""
    before = len(folder.records())
    while process.is_alive() and len(folder.records()) == before:
        pass
    time.sleep(chance.uniform(0, 0.02))
    process.kill()
    process.join()


def kill_writing(process: ForkServerProcess, half_written: Path) -> None:
    """In the middle of writing a checkpoint."""
    while process.is_alive() and not any(half_written.glob("checkpoint-*/adapter_config.json")):
        pass
    process.kill()
    process.join()


def test_killed_at_any_moment_and_resumed_equals_undisturbed(
    make: Make, processes: ForkServerContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in the middle of writing a checkpoint, which is then left out and named."""
    whole, spec = make(out=tmp_path / "whole"), make()
    finetune.run(whole)
    half_written = spec.out / "checkpoints" / ".writing"
    chance = random.Random(1)
    kills = torn = 0
    while kills < 6 or (torn < 2 and kills < 20):
        process = processes.Process(target=job, args=(spec,))
        process.start()
        if kills % 2:
            kill_writing(process, half_written)
        else:
            kill_within(process, RunFolder(spec.out), chance)
        if process.exitcode != -9:
            break  # it was faster
        kills += 1
        torn += half_written.exists()
        spec = dataclasses.replace(spec, resume=True)
    assert kills >= 4
    assert torn >= 1
    if not (spec.out / "run.json").exists():
        half_written.mkdir(exist_ok=True)
        (half_written / "checkpoint-98").mkdir()  # as if it had been killed there once more
        (spec.out / "checkpoints" / "checkpoint-99").mkdir()
        (spec.out / "checkpoints" / "checkpoint-99" / "trainer_state.json").write_text('{"epo')
        with caplog.at_level(logging.WARNING):
            finetune.run(spec)
        for name in ("checkpoint-98", "checkpoint-99"):
            assert f"{name} was not written to its end: it is left out" in caplog.text
    assert_same_adapter(spec.out, whole.out)
    ours, theirs = (RunFolder(s.out).records() for s in (spec, whole))
    losses = [(r.step, r.loss, r.tokens) for r in ours if r.loss is not None]
    assert losses == [(r.step, r.loss, r.tokens) for r in theirs if r.loss is not None]


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system lets us mount nothing")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Nothing more can be written; the file to remove so that it can."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as opened:
        try:
            while opened.write(bytes(1 << 12)):
                pass
        except OSError:
            return filler
    raise AssertionError


def test_a_checkpoint_that_does_not_fit_on_the_disk(
    make: Make, small_disk: Path, tmp_path: Path
) -> None:
    """The error names it, the one before is whole, and the run goes on from there."""
    whole = make(out=tmp_path / "whole", steps=8)
    finetune.run(whole)
    spec = make(out=small_disk / "out", steps=8)
    fillers = []

    def on_event(progress: Progress) -> None:
        if progress.step == 5 and not fillers:
            spare = spec.out / "spare"  # room for the records of the steps to come
            spare.write_bytes(bytes(1 << 15))
            fillers.append(fill(small_disk))
            spare.unlink()

    with pytest.raises(WriteFailed, match=r"checkpoint-6.*MB are free there.*--resume"):
        finetune.run(spec, on_event)
    last = RunFolder(spec.out).last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-4"
    fillers[0].unlink()
    finetune.run(dataclasses.replace(spec, resume=True))
    assert_same_adapter(spec.out, whole.out)


def test_an_adapter_and_records_that_do_not_fit(make: Make, small_disk: Path) -> None:
    filler: list[Path] = []
    spec = make(out=small_disk / "out", steps=2, save_steps=0)
    with pytest.raises(WriteFailed, match=r"progress\.jsonl|adapter_model\.safetensors"):
        finetune.run(spec, lambda progress: filler.append(fill(small_disk)) if not filler else None)
    filler[0].unlink()
    assert finetune.run(dataclasses.replace(spec, resume=True)).steps == 2
    fill(small_disk)
    with pytest.raises(WriteFailed, match=os.fspath(small_disk / "other")):
        finetune.run(make(out=small_disk / "other", steps=2))
