"""A tenant's account: pure, with the time passed in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import QuotaExceeded
from symbiosis.executor.tenants import Account, Bucket, Quota

seconds = st.floats(0, 100, allow_nan=False)
amounts = st.floats(0.01, 1000)


@given(
    capacity=amounts,
    rate=amounts,
    steps=st.lists(st.tuples(seconds, amounts), max_size=40),
)
def test_over_any_span_a_bucket_gives_what_it_holds_what_flows_in_and_one_request(
    capacity: float, rate: float, steps: list[tuple[float, float]]
) -> None:
    """Whoever takes as soon as he may, at any times, within any window."""
    bucket, now_s, taken = Bucket(capacity, rate, 0.0), 0.0, []
    for pause_s, amount in steps:
        now_s += pause_s
        if bucket.empty_for_s(now_s) == 0:
            bucket.take(amount, now_s)
            taken.append((now_s, amount))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            span = taken[first : last + 1]
            most = capacity + rate * (span[-1][0] - span[0][0]) + max(a for _, a in span)
            assert sum(amount for _, amount in span) <= most * (1 + 1e-9) + 1e-6


@given(capacity=amounts, rate=amounts, amount=st.floats(0.01, 1e5))
def test_the_wait_that_a_bucket_names_is_enough_and_no_longer(
    capacity: float, rate: float, amount: float
) -> None:
    bucket = Bucket(capacity, rate, 5.0)
    bucket.take(amount, 5.0)
    wait_s = bucket.empty_for_s(5.0)
    assert bucket.level(5.0 + wait_s * (1 + 1e-6) + 1e-9) > -1e-6
    if wait_s > 2e-3:
        assert bucket.empty_for_s(5.0 + wait_s / 2) > 0


@given(
    before=st.tuples(amounts, amounts),
    after=st.tuples(amounts, amounts),
    used=amounts,
    now_s=seconds,
)
def test_other_limits_forgive_nothing(
    before: tuple[float, float], after: tuple[float, float], used: float, now_s: float
) -> None:
    bucket = Bucket(*before, 0.0)
    bucket.take(used, now_s)
    missing = before[0] - bucket.level(now_s)
    other = bucket.resized(*after, now_s)
    assert other.level(now_s) == pytest.approx(after[0] - missing)


def test_sessions() -> None:
    account = Account("ann", Quota(max_sessions=2), 0.0)
    account.open_session()
    account.open_session()
    with pytest.raises(QuotaExceeded, match="ann has 2 sessions and may have 2 at once: close one"):
        account.open_session()
    account.close_session()
    account.open_session()


@given(limit=st.integers(1, 1000), events=st.lists(st.tuples(st.booleans(), st.integers(1, 900))))
def test_bytes_in_flight(limit: int, events: list[tuple[bool, int]]) -> None:
    """Never more than the limit and one exchange; nothing waits when nothing is in flight."""
    account, flying = Account("ann", Quota(max_bytes_in_flight=limit), 0.0), []
    for arrives, size in events:
        if not arrives and flying:
            account.end(flying.pop())
        elif arrives and account.delay_s(1.0) == 0:
            account.begin(size, 1, 1.0)
            flying.append(size)
        assert account.bytes_in_flight == sum(flying)
        assert account.bytes_in_flight < limit + max(flying, default=1)
        assert account.delay_s(1.0) == (math.inf if sum(flying) >= limit else 0.0)


def test_rows_are_delayed_and_a_burst_is_not() -> None:
    account = Account("ann", Quota(rows_per_s=10, burst_rows=25), 100.0)
    account.begin(0, 25, 100.0)
    assert account.delay_s(100.0) > 0
    assert account.delay_s(100.1) == 0
    account.begin(0, 1000, 100.1)  # more than the bucket holds: delays what comes after
    assert account.delay_s(100.1) == pytest.approx(99.9)
    assert account.delay_s(200.1) == 0


def test_executor_time_runs_out_and_comes_back() -> None:
    account = Account("ann", Quota(executor_s_per_hour=36), 0.0)
    account.begin(0, 1, 0.0)
    account.spent(36.5, 0.0)
    with pytest.raises(
        QuotaExceeded, match=r"36 s of executor time per hour.*again in 50 s, and 0.6"
    ):
        account.begin(0, 1, 0.0)
    account.begin(0, 1, 51.0)
    assert account.executor_s == 36.5


def test_other_limits_in_mid_life() -> None:
    account = Account("ann", Quota(executor_s_per_hour=10), 0.0)
    account.spent(10, 0.0)
    account.limit(Quota(executor_s_per_hour=20), 0.0)
    account.begin(0, 1, 0.0)
    account.limit(Quota(executor_s_per_hour=5), 0.0)
    with pytest.raises(QuotaExceeded):
        account.begin(0, 1, 0.0)
    account.limit(Quota(), 0.0)
    account.begin(0, 1, 0.0)


def test_a_refused_exchange_costs_nothing() -> None:
    account = Account("ann", Quota(executor_s_per_hour=1, rows_per_s=5), 0.0)
    account.spent(2, 0.0)
    with pytest.raises(QuotaExceeded):
        account.begin(100, 100, 0.0)
    assert account.bytes_in_flight == 0
    assert account.delay_s(0.0) == 0
