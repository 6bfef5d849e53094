"""Counters and rates, with the time as an argument."""

from __future__ import annotations

import pytest

from symbiosis.executor import stats as stats_module
from symbiosis.executor.stats import ClientStats, RateMeter, Stats, resident_bytes
from symbiosis.wire.exchange import Op


def test_a_rate_is_a_mean_over_the_last_whole_seconds() -> None:
    meter = RateMeter()
    for second in range(10):
        meter.add(100.5 + second, 20)
    assert meter.rate(110.0) == 20.0
    assert meter.rate(112.0) == 12.0
    assert meter.rate(120.0) == 0.0


def test_a_client_without_exchanges_has_means_of_nothing() -> None:
    client = ClientStats("ann", "unix")
    assert (client.mean_batch, client.mean_queue_ms) == (0.0, 0.0)


def test_means() -> None:
    client = ClientStats("ann", "unix", exchanges=4, batch_members=10, queue_s=0.02)
    snapshot = client.snapshot()
    assert snapshot["mean_batch"] == 2.5
    assert snapshot["mean_queue_ms"] == 5.0


def test_batches_are_counted_by_size_and_operation() -> None:
    stats = Stats(10.0)
    stats.batch_ran(3, [Op.LINEAR] * 3, 30, 11.0, 0.5)
    stats.batch_ran(1, [Op.EMBEDDING], 4, 11.5, 0.25)
    snapshot = stats.snapshot(12.0)
    assert snapshot["batch_sizes"] == {"1": 1, "3": 1}
    assert snapshot["operations"] == {"linear": 3, "embedding": 1}
    assert (snapshot["exchanges"], snapshot["compute_s"], snapshot["uptime_s"]) == (4, 0.75, 2.0)


def test_memory_is_looked_at_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([5, 6])
    monkeypatch.setattr(stats_module, "resident_bytes", lambda: next(looks))
    stats = Stats(0.0)
    found = [stats.snapshot(now_s)["memory_bytes"] for now_s in (1.0, 1.5, 1.99, 2.1)]
    assert found == [5, 5, 5, 6]


def test_this_process_uses_memory() -> None:
    assert resident_bytes() > 1 << 20
