"""Nobody starves, and training keeps its share: the scheduler under saturation, virtual time.

Each client of a `Load` submits its next request the moment the last one has been served.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.executor.scheduler import POLICIES, Batch, Policy, Request, Scheduler
from symbiosis.wire.exchange import Priority

INTERACTIVE, TRAINING = Priority.INTERACTIVE, Priority.TRAINING
Next = Callable[[int], tuple[str, Priority]]


class Load:
    """Drives a scheduler whose clients never rest."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.now_s = 0.0
        self.ids = itertools.count(1)

    def submit(self, client: int, key: str = "k", priority: Priority = INTERACTIVE) -> int:
        number = next(self.ids)
        self.scheduler.submit(Request(number, client, key, 1, priority, self.now_s))
        return number

    def run(self, cost_s: Callable[[Batch], float] = lambda batch: 1e-3) -> tuple[Batch, float]:
        """The next batch, after whatever hold, and what it took."""
        batch = self.scheduler.next_batch(self.now_s)
        if batch is None:
            wake_s = self.scheduler.wake_at(self.now_s)
            assert wake_s is not None
            self.now_s = wake_s
            batch = self.scheduler.next_batch(self.now_s)
        assert batch is not None
        elapsed_s = cost_s(batch)
        self.now_s += elapsed_s
        self.scheduler.finished(batch, self.now_s, elapsed_s)
        return batch, elapsed_s

    def batches_until(self, number: int, limit: int, again: Next) -> int:
        """How many batches run until request ``number`` does; everybody else comes back."""
        for count in range(1, limit + 1):
            batch, _ = self.run()
            if any(request.id == number for request in batch.requests):
                return count
            for request in batch.requests:
                self.submit(request.client, *again(request.client))
        raise AssertionError(f"request {number} did not run in {limit} batches")


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60)
@given(keys=st.lists(st.sampled_from("abv"), min_size=1, max_size=8), warm_up=st.integers(0, 20))
def test_every_request_leaves_within_one_round(
    policy: Policy, keys: list[str], warm_up: int
) -> None:
    """The others want one weight each, for ever; the victim's turn comes all the same."""
    load = Load(Scheduler(policy))
    others = dict(enumerate(keys, start=2))
    for client, key in others.items():
        load.submit(client, key)
    for _ in range(warm_up):
        batch, _ = load.run()
        for request in batch.requests:
            load.submit(request.client, others[request.client])
    victim = load.submit(1, "v")
    load.batches_until(victim, 2 * (len(others) + 1), lambda client: (others[client], INTERACTIVE))


@pytest.mark.parametrize("policy", POLICIES)
def test_newcomers_do_not_starve_who_is_there(policy: Policy) -> None:
    """A client that reconnects for each request must not be first each time."""
    load = Load(Scheduler(policy))
    load.submit(1, "a")
    load.run()
    victim = load.submit(1, "a")
    for newcomer in range(2, 60):
        load.submit(newcomer, "b")
        batch, _ = load.run()
        if any(request.id == victim for request in batch.requests):
            return
        load.scheduler.remove_client(newcomer)
    raise AssertionError("58 newcomers in a row went first")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("others", [1, 2, 6])
def test_a_training_request_leaves_under_interactive_load(policy: Policy, others: int) -> None:
    load = Load(Scheduler(policy, training_share=0.2))
    for client in range(2, 2 + others):
        load.submit(client, f"w{client}")
    victim = load.submit(1, "w", TRAINING)
    load.batches_until(victim, 20, lambda client: (f"w{client}", INTERACTIVE))


def training_time(load: Load, batches: int, cost_s: Callable[[Batch], float]) -> float:
    """The part of the time that training had; every client always has a request waiting."""
    spent = {INTERACTIVE: 0.0, TRAINING: 0.0}
    for _ in range(batches):
        batch, elapsed_s = load.run(cost_s)
        spent[batch.priority] += elapsed_s
        for request in batch.requests:
            load.submit(request.client, str(request.key), batch.priority)
    return spent[TRAINING] / sum(spent.values())


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(
    share=st.sampled_from([0.05, 0.2, 0.5, 0.8]),
    interactive=st.integers(1, 4),
    trainers=st.integers(1, 3),
    seed=st.integers(0, 9999),
)
def test_training_keeps_its_share_and_no_more(
    policy: Policy, share: float, interactive: int, trainers: int, seed: int
) -> None:
    random = Random(seed)
    load = Load(Scheduler(policy, training_share=share))
    for client in range(interactive):
        load.submit(client, "i")
    for client in range(trainers):
        load.submit(100 + client, "t", TRAINING)

    def cost_s(batch: Batch) -> float:
        most = 4e-3 if batch.priority is INTERACTIVE else 20e-3
        return random.uniform(most / 4, most)

    assert abs(training_time(load, 1500, cost_s) - share) < 0.06


def test_a_share_of_nothing_is_nothing() -> None:
    load = Load(Scheduler("greedy", training_share=0.0))
    load.submit(1)
    load.submit(2, priority=TRAINING)
    assert training_time(load, 200, lambda batch: 1e-3) == 0.0


def test_no_debt_grows_while_training_does_not_wait() -> None:
    load = Load(Scheduler("greedy", training_share=0.5))
    for _ in range(100):
        load.submit(1)
        load.run()
    load.submit(2, priority=TRAINING)
    load.submit(1)
    batch, _ = load.run()
    assert batch.priority is INTERACTIVE
