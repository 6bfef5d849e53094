"""How a fine-tuning run shows on the terminal: a bar, or lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from symbiosis.cli import console

if TYPE_CHECKING:
    from symbiosis.jobs.record import Progress

_LINE_INTERVAL_S = 5.0


@contextlib.contextmanager
def progress_of(title: str) -> Iterator[Callable[[Progress], None]]:
    """What to call with every record of the run, on stderr."""
    if sys.stderr.isatty():
        with _bar(title) as show:
            yield show
    else:
        yield _Lines().show


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[Progress], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    figures = TextColumn("{task.fields[figures]}")
    with Bar(*columns, figures, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, figures="starting")
        latest: dict[str, float] = {}

        def show(progress: Progress) -> None:
            latest.update(_losses(progress))
            bar.update(
                task,
                completed=progress.step,
                total=progress.steps,
                figures=_figures(progress, latest),
            )

        yield show


class _Lines:
    """A line now and then, and for every evaluation and the last step."""

    def __init__(self) -> None:
        self._shown_s = -_LINE_INTERVAL_S
        self._latest: dict[str, float] = {}

    def show(self, progress: Progress) -> None:
        self._latest.update(_losses(progress))
        now_s = time.monotonic()
        special = progress.eval_loss is not None or progress.step == progress.steps
        if special or now_s - self._shown_s >= _LINE_INTERVAL_S:
            self._shown_s = now_s
            figures = _figures(progress, self._latest)
            print(f"step {progress.step}/{progress.steps}: {figures}", file=sys.stderr)


def _losses(progress: Progress) -> dict[str, float]:
    found = {"loss": progress.loss, "held-out loss": progress.eval_loss}
    return {name: value for name, value in found.items() if value is not None}


def _figures(progress: Progress, latest: dict[str, float]) -> str:
    parts = [f"{name} {value:.4f}" for name, value in latest.items()]
    if progress.tokens_per_s:
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.eta_s is not None:
        parts.append(f"{console.duration(progress.eta_s)} left")
    return ", ".join(parts)
