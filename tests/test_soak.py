"""Twenty seconds of what `make soak` does for minutes or hours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from soak.run import Soak


@pytest.mark.timeout(240)
def test_a_short_soak(tmp_path: Path) -> None:
    report = Soak(tmp_path, seed=2, log=sys.stderr).run(seconds=20, cycle_s=10)
    assert report.violations == []
    assert report.executors_killed >= 1
    assert sum(report.clients.values()) > 5
    assert report.exchanges > 100
