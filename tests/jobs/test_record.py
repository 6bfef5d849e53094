from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from symbiosis.errors import SymbiosisError, WriteFailed
from symbiosis.jobs.record import Progress, RunFolder

JOB = {"method": "LORA", "seed": 3, "options": {"r": 8}}


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.check(resume=False, overwrite=False)
    with folder:
        folder.begin(JOB, resume=False)
    return folder


def checkpoint(folder: RunFolder, step: int, *, complete: bool = True) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        (path / "trainer_state.json").write_text("{}")
    return path


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    with pytest.raises(SymbiosisError, match=r"already holds a run: .*--resume.*--overwrite"):
        RunFolder(tmp_path / "out").check(resume=False, overwrite=False)


def test_an_adapter_alone_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SymbiosisError, match="already holds a run"):
        RunFolder(tmp_path).check(resume=False, overwrite=False)


def test_other_files_are_no_run_and_survive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder = begun(tmp_path)
    checkpoint(folder, 3)
    folder.finish({})
    with folder:
        folder.check(resume=False, overwrite=True)
        folder.begin(JOB, resume=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.json", "notes.txt"]


def test_overwriting_does_not_follow_links(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("gold")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").symlink_to(treasure)
    with RunFolder(tmp_path / "out") as folder:
        folder.begin(JOB, resume=False)
    assert (treasure / "gold").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SymbiosisError, match="is a file"):
        RunFolder(tmp_path / "out").check(resume=False, overwrite=True)


def test_what_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(SymbiosisError, match="no run to resume"):
        RunFolder(tmp_path / "none").check(resume=True, overwrite=False)
    folder = begun(tmp_path / "out")
    with folder:
        folder.check(resume=True, overwrite=False)
        folder.begin(JOB, resume=True)
        with pytest.raises(SymbiosisError, match=r"seed was 3 and is 4"):
            folder.begin({**JOB, "seed": 4}, resume=True)
    folder.finish({"loss": 1})
    with pytest.raises(SymbiosisError, match="is complete"):
        folder.check(resume=True, overwrite=False)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("symbiosis.jobs.record.os.open", refuse)
    with pytest.raises(SymbiosisError, match="cannot be read: Permission denied"):
        RunFolder(tmp_path).check(resume=False, overwrite=False)


@pytest.mark.parametrize("again", [{"overwrite": True}, {"resume": True}])
def test_two_processes_do_not_work_in_one_folder(tmp_path: Path, again: dict[str, bool]) -> None:
    """In either order: who comes later is told at once, or when both are about to begin."""
    asked = {"resume": False, "overwrite": False, **again}
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    begun(tmp_path / "out")
    for folder in (first, second):
        folder.check(**asked)
    with first:
        first.begin(JOB, resume=asked["resume"])
        with pytest.raises(SymbiosisError, match="another process is at work"):
            second.check(**asked)
        with pytest.raises(SymbiosisError, match="another process is at work"):
            second.begin(JOB, resume=asked["resume"])
    with second:
        second.begin(JOB, resume=asked["resume"])


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from symbiosis.jobs.record import RunFolder;"
        f"folder = RunFolder(pathlib.Path({str(tmp_path / 'out')!r}));"
        "folder.begin({}, resume=False); print('begun', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        folder = RunFolder(tmp_path / "out")
        with pytest.raises(SymbiosisError, match="another process is at work"):
            folder.check(resume=True, overwrite=False)
        process.kill()
    folder.check(resume=True, overwrite=False)


def test_checkpoints_elsewhere_are_replaced_with_the_run(tmp_path: Path) -> None:
    """Where there is more room."""
    elsewhere = tmp_path / "elsewhere"
    for name in ("checkpoint-500", ".writing", "mine"):
        (elsewhere / name).mkdir(parents=True)
    folder = begun(tmp_path / "out")
    (tmp_path / "out" / "checkpoints").symlink_to(elsewhere)
    with folder:
        folder.begin(JOB, resume=False)
    assert folder.checkpoints.is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_has_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed) as raised:
        RunFolder(tmp_path / "file" / "out").begin(JOB, resume=False)
    assert "--resume" not in str(raised.value)


def test_a_damaged_job_file(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(SymbiosisError, match=r"job.json is damaged"):
        folder.begin(JOB, resume=True)


def test_the_last_complete_checkpoint(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    assert folder.last_checkpoint() is None
    checkpoint(folder, 9)
    tenth = checkpoint(folder, 10)
    checkpoint(folder, 11, complete=False)
    (folder.checkpoints / "checkpoint-x").mkdir()
    assert folder.last_checkpoint() == tenth


def test_records(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    assert folder.records() == []
    written = [Progress(step, 5, loss=1 / (1 + step), eta_s=0.5) for step in range(5)]
    for record in written:
        folder.append(record)
        assert folder.records()[-1] == record, "a reader sees it at once"
    with (tmp_path / "progress.jsonl").open("a") as opened:
        opened.write('{"step": 5, "st')
    assert folder.records() == written
    assert folder.rewind(2) == written[:3]
    folder.append(written[3])
    assert folder.records() == written[:4]


def test_curve(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.write_curve()  # of nothing
    folder.append(Progress(0, 2, eval_loss=3.0))
    folder.append(Progress(1, 2, loss=2.0, learning_rate=0.1, tokens_per_s=5.0))
    folder.append(Progress(2, 2, eval_loss=1.0))
    folder.write_curve()
    with (tmp_path / "curve.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["step"], row["loss"], row["eval_loss"]) for row in rows] == [
        ("0", "", "3.0"),
        ("1", "2.0", ""),
        ("2", "", "1.0"),
    ]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.finish({"loss": 1.5})
    assert json.loads((tmp_path / "run.json").read_text()) == {"loss": 1.5}
    assert not list(tmp_path.glob(".*"))
