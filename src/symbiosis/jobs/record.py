"""What a fine-tuning run leaves in its folder, while it goes on and afterwards.

::

    OUT/job.json              what decides the result; a resumed run must agree with it
    OUT/progress.jsonl        one record per logged step, written at once
    OUT/checkpoints/          checkpoint-STEP folders, each whole: they are written aside first
    OUT/adapter_*             the adapter, as peft loads it
    OUT/curve.csv, curve.png  the learning curve
    OUT/run.json              the outcome; there only when the run has finished

Nothing is written outside the folder, and nothing in it is removed but these. Knows files; knows
no torch.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from symbiosis.errors import SymbiosisError, WriteFailed

logger = logging.getLogger(__name__)

_FILES = (
    "job.json",
    "run.json",
    "progress.jsonl",
    "curve.csv",
    "curve.png",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_CHECKPOINTS = "checkpoints"
_LAST_WRITTEN = "trainer_state.json"  # a checkpoint with it is complete
WRITING = ".writing"
"""In the folder of checkpoints: where the next one is written."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """One record of a run under way; what was not measured at this step is None."""

    step: int
    steps: int
    loss: float | None = None
    """Training loss, the mean since the last record, in nats per token."""
    eval_loss: float | None = None
    """Held-out loss, in nats per token."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int = 0
    """Trained on so far, without padding."""
    tokens_per_s: float = 0.0
    """Since this process began to train; evaluations are not counted in."""
    elapsed_s: float = 0.0
    """Since the run began, over all its processes."""
    eta_s: float | None = None


class RunFolder:
    """The folder of one run. As a context, it is one process's from `begin` on, as far as its file
    system knows locks: another one is refused there and in `check`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = -1  # descriptor of the folder, while it is locked

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._held >= 0:
            os.close(self._held)
        self._held = -1

    @property
    def checkpoints(self) -> Path:
        return self.path / _CHECKPOINTS

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what must not be overwritten or cannot be resumed; changes nothing.

        Raises SymbiosisError.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SymbiosisError(f"{self.path} is a file; --out must be a folder")
        if self.path.exists() and self._held < 0:
            os.close(_locked(self.path))
        if resume:
            self._check_resumable()
        elif self._holds_run() and not overwrite:
            raise SymbiosisError(
                f"{self.path} already holds a run: choose another --out, go on with --resume, "
                f"or replace it with --overwrite"
            )

    def begin(self, job: Mapping[str, Any], *, resume: bool) -> None:
        """Take the folder for a run that ``job`` describes, emptied of an earlier one.

        Raises SymbiosisError if another process has it, and when resuming one that names what
        differs from the run in the folder.
        """
        with writing(self.path, resumes=resume):
            self.path.mkdir(parents=True, exist_ok=True)
        if self._held < 0:
            self._held = _locked(self.path)
        if resume:
            self._check_same(job)
            return
        with writing(self.path, resumes=False):
            self._clear()
        _write_json(self.path / "job.json", job)

    def last_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step, or None; says which it leaves out."""
        found = {}
        for path in self.checkpoints.glob(f"{WRITING}/checkpoint-*"):
            logger.warning("%s was not written to its end: it is left out", path)
        for path in self.checkpoints.glob("checkpoint-*"):
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and _is_json(path / _LAST_WRITTEN):
                found[int(match[1])] = path
            elif match:
                logger.warning("%s was not written to its end: it is left out", path)
        return found[max(found)] if found else None

    def records(self) -> list[Progress]:
        """What has been written so far; a line torn by a crash is left out."""
        records = []
        for line in self._progress_lines():
            try:
                records.append(Progress(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return records

    def rewind(self, step: int) -> list[Progress]:
        """Forget the records after ``step``; those that are left."""
        kept = [record for record in self.records() if record.step <= step]
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in kept]
        _replace(self.path / "progress.jsonl", "".join(lines))
        return kept

    def append(self, record: Progress) -> None:
        """Write a record so that another process sees it at once."""
        file = self.path / "progress.jsonl"
        with writing(file), file.open("a") as opened:
            opened.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def write_curve(self) -> None:
        """``curve.csv`` and ``curve.png`` from the records."""
        records = self.records()
        file = self.path / "curve.csv"
        columns = ("step", "loss", "eval_loss", "learning_rate", "tokens_per_s", "elapsed_s")
        with writing(file), file.open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(columns)
            writer.writerows([getattr(record, name) for name in columns] for record in records)
        with writing(self.path / "curve.png"):
            _draw(records, self.path / "curve.png")

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write ``run.json``: the run is complete."""
        _write_json(self.path / "run.json", report)

    def _holds_run(self) -> bool:
        return any((self.path / name).exists() for name in (*_FILES, _CHECKPOINTS))

    def _check_resumable(self) -> None:
        if not (self.path / "job.json").is_file():
            raise SymbiosisError(f"{self.path} holds no run to resume; start it without --resume")
        if (self.path / "run.json").is_file():
            raise SymbiosisError(
                f"the run in {self.path} is complete: there is nothing to resume; run it anew "
                f"with --overwrite"
            )

    def _check_same(self, job: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.path / "job.json").read_text())
        except ValueError as error:
            raise SymbiosisError(f"{self.path / 'job.json'} is damaged: {error}") from None
        now = json.loads(json.dumps(job, default=str))
        differs = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if differs:
            raise SymbiosisError(
                f"the run in {self.path} cannot be resumed as another one: {'; '.join(differs)}"
            )

    def _clear(self) -> None:
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        if self.checkpoints.is_symlink():  # to where there is room
            for path in (*self.checkpoints.glob("checkpoint-*"), self.checkpoints / WRITING):
                shutil.rmtree(path, ignore_errors=True)
        elif self.checkpoints.is_dir():
            shutil.rmtree(self.checkpoints)

    def _progress_lines(self) -> list[str]:
        file = self.path / "progress.jsonl"
        return file.read_text().splitlines() if file.exists() else []


def _locked(folder: Path) -> int:
    """A descriptor that holds ``folder`` until it is closed, or its process ends. Raises
    SymbiosisError if somebody else holds it, or it cannot be read."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise SymbiosisError(
            f"{folder} cannot be read: {error.strerror}; choose another --out, or see to it that "
            f"this user may"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SymbiosisError(
            f"another process is at work on the run in {folder}: wait for it, end it, or choose "
            f"another --out"
        ) from None
    except OSError as error:  # a network's file system, perhaps
        logger.warning("%s cannot be locked, so two runs could meet there: %s", folder, error)
    return descriptor


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _replace(path, json.dumps(values, indent=2, default=str) + "\n")


def _replace(path: Path, text: str) -> None:
    """All or nothing, whenever the process ends."""
    fresh = path.with_name(f".{path.name}.new")
    with writing(path):
        fresh.write_text(text)
        os.replace(fresh, path)


@contextlib.contextmanager
def writing(path: Path, *, resumes: bool = True) -> Iterator[None]:
    """What libraries raise when ``path`` cannot be written becomes a WriteFailed that names it, and
    says how to go on if there is a run to be resumed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        free = shutil.disk_usage(_existing(path)).free
        onward = "; the run goes on from its last complete checkpoint with --resume"
        raise WriteFailed(
            f"cannot write {path}: {reason} ({free / 1e6:,.0f} MB are free there)"
            f"{onward if resumes else ''}"
        ) from error


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def _draw(records: Sequence[Progress], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [(r.step, r.loss) for r in records if r.loss is not None]
    held_out = [(r.step, r.eval_loss) for r in records if r.eval_loss is not None]
    if train:
        axes.plot(*zip(*train, strict=True), label="training loss", linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held-out loss")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
