"""The scheduler's invariants over generated traces, in virtual time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from symbiosis.executor.scheduler import POLICIES, Batch, Policy, Request, Scheduler
from symbiosis.wire.exchange import Priority

MAX_ROWS = 16
HOLD_S = 0.5

clients = st.integers(1, 5)


class Traces(RuleBasedStateMachine):
    """Clients come, submit and leave in any order; the books are kept here."""

    policy: Policy

    @initialize(share=st.sampled_from([0.0, 0.2, 0.7]))
    def start(self, share: float) -> None:
        self.scheduler = Scheduler(
            self.policy, max_rows=MAX_ROWS, training_share=share, lockstep_hold_s=HOLD_S
        )
        self.share = share
        self.now_s = 0.0
        self.ids = itertools.count(1)
        self.waiting: dict[int, list[Request]] = {}
        self.left: set[int] = set()
        self.begun: dict[int, int] = {}  # request → rows computed in pieces

    @rule(
        client=clients,
        key=st.sampled_from("abc"),
        rows=st.sampled_from([0, 1, 5, 9, 16, 40, 500]),
        priority=st.sampled_from(Priority),
        opens=st.booleans(),
        divisible=st.booleans(),
    )
    def submit(
        self, client: int, key: str, rows: int, priority: Priority, opens: bool, divisible: bool
    ) -> None:
        request = Request(next(self.ids), client, key, rows, priority, self.now_s, opens, divisible)
        self.scheduler.submit(request)
        self.waiting.setdefault(client, []).append(request)

    @rule(client=clients)
    def leave(self, client: int) -> None:
        expected = [request.id for request in self.waiting.pop(client, [])]
        assert self.scheduler.remove_client(client) == expected
        self.left.update(expected)

    @rule(seconds=st.floats(0, 1))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(took_s=st.floats(0, 0.3), then=st.sampled_from("abc "))
    def run(self, took_s: float, then: str) -> None:
        """Run a batch; with a key in ``then``, its requests go on with that."""
        batch = self.scheduler.next_batch(self.now_s)
        if batch is None:
            return
        self.check(batch)
        self.now_s += took_s
        self.scheduler.finished(batch, self.now_s, took_s)
        if then.isalpha() and batch.priority is Priority.INTERACTIVE:
            for request in batch.requests:
                goes_on = request._replace(key=then, arrived_s=self.now_s, opens=False)
                assert self.scheduler.resume(goes_on)
                self.waiting[request.client].insert(0, goes_on)
                self.left.remove(request.id)

    @precondition(lambda self: any(self.waiting.values()))
    @rule()
    def wait_and_run(self) -> None:
        """Asked again at the time that it names, the scheduler has a batch."""
        batch = self.scheduler.next_batch(self.now_s)
        if batch is None:
            wake_s = self.scheduler.wake_at(self.now_s)
            assert wake_s is not None
            assert self.now_s < wake_s
            assert self.policy != "lockstep" or wake_s <= self.now_s + HOLD_S
            self.now_s = wake_s
            batch = self.scheduler.next_batch(self.now_s)
            while batch is None and self.policy == "align":  # held for others, one after another
                wake_s = self.scheduler.wake_at(self.now_s)
                assert wake_s is not None
                assert wake_s > self.now_s
                self.now_s = wake_s
                batch = self.scheduler.next_batch(self.now_s)
        assert batch is not None
        self.check(batch)

    def check(self, batch: Batch) -> None:
        heads = {client: queue[0] for client, queue in self.waiting.items() if queue}
        assert batch.requests
        assert len({request.client for request in batch.requests}) == len(batch.requests)
        assert len({(request.key, request.priority) for request in batch.requests}) == 1
        assert batch.rows <= MAX_ROWS or len(batch.requests) == 1
        if batch.is_piece:
            self.check_piece(batch)
        assert self.policy != "none" or len(batch.requests) == 1
        for request in batch.requests:
            assert heads[request.client] == request, "a client's order was not kept"
            if not batch.completes:
                continue
            self.waiting[request.client].pop(0)
            assert request.id not in self.left
            self.left.add(request.id)
        if self.share == 0:
            assert batch.priority == min(head.priority for head in heads.values())

    def check_piece(self, batch: Batch) -> None:
        """Pieces of one training request follow one another without a gap."""
        (request,) = batch.requests
        assert self.policy == "align"
        assert request.priority is Priority.TRAINING
        assert request.divisible
        assert batch.start == self.begun.pop(request.id, 0)
        assert batch.start < batch.start + batch.rows <= request.rows
        if not batch.completes:
            self.begun[request.id] = batch.start + batch.rows

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            assert len(self.scheduler) == sum(map(len, self.waiting.values()))
            if not len(self.scheduler):
                assert self.scheduler.next_batch(self.now_s) is None
                assert self.scheduler.wake_at(self.now_s) is None

    def teardown(self) -> None:
        """Everything that waits leaves in the end."""
        if hasattr(self, "scheduler"):
            while any(self.waiting.values()):
                self.wait_and_run()
            self.nothing_is_lost()


@pytest.mark.parametrize("policy", POLICIES)
def test_traces(policy: Policy) -> None:
    machine = type("Machine", (Traces,), {"policy": policy})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=50, stateful_step_count=40, deadline=None)
    )


def request(number: int, client: int, key: str = "k", **fields: object) -> Request:
    return Request(number, client, key, 1, Priority.INTERACTIVE, 0.0)._replace(**fields)


def ids(batch: Batch | None) -> list[int]:
    return [] if batch is None else [request.id for request in batch.requests]


def test_greedy_joins_every_waiting_head_with_the_leaders_key() -> None:
    scheduler = Scheduler("greedy")
    for number, key in enumerate("abab", start=1):
        scheduler.submit(request(number, number, key))
    assert ids(scheduler.next_batch(0.0)) == [1, 3]
    assert ids(scheduler.next_batch(0.0)) == [2, 4]
    assert scheduler.next_batch(0.0) is None


def test_greedy_starts_with_the_client_served_longest_ago() -> None:
    scheduler = Scheduler("greedy")
    for number in (1, 2):
        scheduler.submit(request(number, number, f"w{number}"))
        assert ids(scheduler.next_batch(0.0)) == [number]
    scheduler.submit(request(3, 2, "a", arrived_s=1.0))
    scheduler.submit(request(4, 1, "b", arrived_s=2.0))
    assert ids(scheduler.next_batch(2.0)) == [4]


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    scheduler = Scheduler("greedy", max_rows=10)
    scheduler.submit(request(1, 1, rows=25))
    scheduler.submit(request(2, 2, rows=1))
    assert ids(scheduler.next_batch(0.0)) == [1]
    assert ids(scheduler.next_batch(0.0)) == [2]


def test_priorities_are_not_mixed_and_interactive_goes_first() -> None:
    scheduler = Scheduler("greedy")
    scheduler.submit(request(1, 1, priority=Priority.TRAINING))
    scheduler.submit(request(2, 2))
    assert ids(scheduler.next_batch(0.0)) == [2]
    assert ids(scheduler.next_batch(0.0)) == [1]


def test_lockstep_holds_until_everybody_at_work_waits() -> None:
    scheduler = Scheduler("lockstep", lockstep_hold_s=1.0)
    scheduler.submit(request(1, 1, "a", arrived_s=0.0))
    scheduler.submit(request(2, 2, "a", arrived_s=0.0))
    assert ids(scheduler.next_batch(0.0)) == [1, 2]
    scheduler.submit(request(3, 1, "b", arrived_s=0.5))
    assert scheduler.next_batch(0.5) is None, "client 2 is at work"
    assert scheduler.wake_at(0.5) == 1.5
    scheduler.submit(request(4, 2, "b", arrived_s=0.6))
    assert ids(scheduler.next_batch(0.6)) == [3, 4]


def test_lockstep_does_not_wait_for_who_left_or_rests() -> None:
    scheduler = Scheduler("lockstep", lockstep_hold_s=1.0)
    for client in (1, 2, 3):
        scheduler.submit(request(client, client))
    assert ids(scheduler.next_batch(0.0)) == [1, 2, 3]
    scheduler.remove_client(2)
    scheduler.submit(request(4, 1, arrived_s=1.5))  # client 3 has not been seen for 1.5 s
    assert ids(scheduler.next_batch(1.5)) == [4]


def test_lockstep_never_holds_longer_than_its_hold() -> None:
    scheduler = Scheduler("lockstep", lockstep_hold_s=1.0)
    scheduler.submit(request(1, 1))
    scheduler.submit(request(2, 2))
    assert ids(scheduler.next_batch(0.0)) == [1, 2]
    scheduler.finished(Batch((request(2, 2),)), 0.9, 0.9)
    scheduler.submit(request(3, 1, arrived_s=0.1))
    assert scheduler.next_batch(1.0) is None
    assert ids(scheduler.next_batch(1.1)) == [3]


def test_lockstep_runs_the_fullest_batch() -> None:
    scheduler = Scheduler("lockstep", lockstep_hold_s=1.0)
    for number, key in enumerate("abb", start=1):
        scheduler.submit(request(number, number, key))
    assert ids(scheduler.next_batch(0.0)) == [2, 3]


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        Scheduler("greedy", training_share=share)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="align, greedy, lockstep, none"):
        Scheduler("fair")  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_goes_on_comes_before_all_else_of_its_client(policy: Policy) -> None:
    scheduler = Scheduler(policy)
    for number in (1, 2):
        scheduler.submit(request(number, client=1, key="a"))
    assert ids(scheduler.next_batch(0.0)) == [1]
    assert scheduler.resume(request(1, client=1, key="b"))
    assert [ids(scheduler.next_batch(0.0)) for _ in range(2)] == [[1], [2]]


def test_nothing_goes_on_of_a_client_that_has_left() -> None:
    scheduler = Scheduler("align")
    scheduler.submit(request(1, client=1))
    assert ids(scheduler.next_batch(0.0)) == [1]
    assert scheduler.remove_client(1) == []
    assert not scheduler.resume(request(1, client=1, key="b"))
    assert len(scheduler) == 0
