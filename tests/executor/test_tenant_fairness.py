"""Between tenants: shares of the executor's time, nobody starves, nothing rests. Virtual time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.executor.scheduler import POLICIES, Batch, Policy, Request, Scheduler
from symbiosis.wire.exchange import Priority

INTERACTIVE, TRAINING = Priority.INTERACTIVE, Priority.TRAINING


class Shop:
    """Clients that ask again the moment they have been served; each has its own weight, unless
    ``key`` says otherwise."""

    def __init__(self, scheduler: Scheduler, cost_s: Callable[[Request], float]) -> None:
        self.scheduler = scheduler
        self.cost_s = cost_s
        self.now_s = 0.0
        self.ids = itertools.count(1)
        self.had_s: Counter[str | None] = Counter()
        self.longest_s = 0.0

    def ask(
        self,
        client: int,
        tenant: str | None,
        *,
        rows: int = 1,
        key: object = None,
        priority: Priority = INTERACTIVE,
    ) -> int:
        number = next(self.ids)
        self.scheduler.submit(
            Request(number, client, key or client, rows, priority, self.now_s, tenant=tenant)
        )
        return number

    def run(self) -> Batch:
        batch = self.scheduler.next_batch(self.now_s)
        if batch is None:  # held for others
            wake_s = self.scheduler.wake_at(self.now_s)
            assert wake_s is not None and wake_s >= self.now_s
            self.now_s = wake_s
            batch = self.scheduler.next_batch(self.now_s)
        assert batch is not None
        elapsed_s = sum(map(self.cost_s, batch.requests))
        self.longest_s = max(self.longest_s, elapsed_s)
        self.now_s += elapsed_s
        for request in batch.requests:
            self.had_s[request.tenant] += self.cost_s(request)
        self.scheduler.finished(batch, self.now_s, elapsed_s)
        return batch

    def serve(self, batches: int) -> None:
        for _ in range(batches):
            for request in self.run().requests:
                self.ask(request.client, request.tenant, rows=request.rows, key=request.key)


def shop(
    policy: Policy = "greedy",
    cost_s: Callable[[Request], float] = lambda request: 1e-3,
    **shares: float,
) -> Shop:
    scheduler = Scheduler(policy)
    for tenant, share in shares.items():
        scheduler.set_share(tenant, share)
    return Shop(scheduler, cost_s)


@pytest.mark.parametrize("policy", ["align", "greedy", "none", "lockstep"])
def test_fifty_sessions_get_no_more_than_one(policy: Policy) -> None:
    opened = shop(policy, many=1, one=1)
    for client in range(50):
        opened.ask(client, "many")
    opened.ask(99, "one")
    opened.serve(600)
    assert opened.had_s["one"] >= 0.45 * sum(opened.had_s.values())


@settings(max_examples=60)
@given(
    sessions=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    shares=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=4, max_size=4),
    costs=st.lists(st.floats(1e-4, 1e-2), min_size=4, max_size=4),
    policy=st.sampled_from(["greedy", "none"]),
)
def test_shares_are_kept_within_the_cost_of_a_batch_of_each(
    sessions: list[int], shares: list[float], costs: list[float], policy: Policy
) -> None:
    """Whatever their numbers of sessions and however costly their exchanges."""
    names = "abcd"[: len(sessions)]
    opened = shop(
        policy,
        lambda request: costs["abcd".index(str(request.tenant))],
        **dict(zip(names, shares, strict=False)),
    )
    clients = itertools.count(1)
    for name, count in zip(names, sessions, strict=True):
        for _ in range(count):
            opened.ask(next(clients), name)
    for _ in range(20):
        opened.serve(25)
        had = [opened.had_s[name] / share for name, share in zip(names, shares, strict=False)]
        slack = sum(
            2 * cost / share for cost, share in zip(costs, shares, strict=True)
        )  # of this moment, not of the length of the run
        assert max(had) - min(had) <= slack


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(crowd=st.lists(st.sampled_from("abv"), min_size=1, max_size=12), warm_up=st.integers(0, 30))
def test_nobody_starves(policy: Policy, crowd: list[str], warm_up: int) -> None:
    """One exchange of a tenant that has been away, against a crowd of another that never rests."""
    opened = shop(policy, crowd=1, late=1)
    for client, key in enumerate(crowd, 2):
        opened.ask(client, "crowd", key=key)
    opened.serve(warm_up)
    number = opened.ask(1, "late", key="v")
    for count in itertools.count(1):
        batch = opened.run()
        if any(request.id == number for request in batch.requests):
            break
        for request in batch.requests:
            opened.ask(request.client, "crowd", key=request.key)
        assert count <= 2 * (len(crowd) + 1)
    if policy in ("greedy", "none"):
        assert count <= 2  # at most the one after next


def test_a_pause_earns_no_credit() -> None:
    opened = shop(busy=1, idle=1)
    opened.ask(1, "busy")
    opened.serve(1000)
    opened.ask(2, "idle")
    before = opened.had_s["busy"]
    opened.serve(100)
    assert opened.had_s["idle"] == pytest.approx(opened.had_s["busy"] - before, abs=2.1e-3)


def test_joining_a_batch_does_not_put_those_who_come_back_behind() -> None:
    """Somebody who has had much rides along; a third, coming back, starts with whoever has had
    least, not behind the one that rides along."""
    opened = shop(cost_s=lambda request: 1e-3 * request.rows, small=1, large=1, third=1)
    opened.ask(1, "small", key="w")
    opened.ask(2, "large", rows=500, key="w")
    opened.serve(50)
    number = opened.ask(3, "third")
    for _ in range(2):
        batch = opened.run()
        if any(request.id == number for request in batch.requests):
            return
        for request in batch.requests:
            opened.ask(request.client, request.tenant, rows=request.rows, key=request.key)
    raise AssertionError("the third waits")


def test_whoever_waits_for_the_same_weight_joins_across_tenants() -> None:
    opened = shop(a=1, b=1)
    for client, tenant in ((1, "a"), (2, "b"), (3, None)):
        opened.ask(client, tenant, key="w")
    assert len(opened.run().requests) == 3


def test_leaving_and_coming_back_forgives_nothing() -> None:
    opened = shop(a=1, b=1)
    opened.ask(1, "a")
    opened.ask(2, "b")
    clients = itertools.count(10)
    for _ in range(400):
        for request in opened.run().requests:
            client = request.client
            if request.tenant == "a":  # a session for each exchange
                opened.scheduler.remove_client(client)
                client = next(clients)
            opened.ask(client, request.tenant)
    assert opened.had_s["a"] == pytest.approx(opened.had_s["b"], abs=2.1e-3)


def test_classes_of_priority_are_apart() -> None:
    """Training that has waited long earns its tenant nothing among those who decode."""
    opened = shop(a=1, b=1)
    opened.ask(1, "a", priority=TRAINING)
    opened.ask(2, "b")
    opened.serve(100)  # b, mostly
    opened.ask(3, "a")
    before = opened.had_s["b"]
    for _ in range(60):
        batch = opened.run()
        for request in batch.requests:
            opened.ask(request.client, request.tenant, priority=request.priority)
    assert opened.had_s["b"] - before >= 0.02


events = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "run", "leave"]),
        st.integers(1, 6),
        st.sampled_from("uvw"),
        st.sampled_from([INTERACTIVE, TRAINING]),
    ),
    max_size=60,
)


@pytest.mark.parametrize("policy", POLICIES)
@given(script=events, tenants=st.booleans())
def test_one_tenant_is_as_none_and_everything_leaves_once(
    policy: Policy, script: list[tuple[str, int, str, Priority]], tenants: bool
) -> None:
    """The same events with everybody in one tenant and without tenants: the same batches."""
    with_one, without = shop(policy, only=1), shop(policy)
    for what, client, key, priority in script:
        for each, tenant in ((with_one, "only"), (without, None)):
            if what == "ask":
                each.ask(client, tenant, key=key, priority=priority)
            elif what == "leave":
                each.scheduler.remove_client(client)
        if what == "run" and len(without.scheduler):
            ours, theirs = with_one.run(), without.run()
            assert [r.id for r in ours.requests] == [r.id for r in theirs.requests]
    while len(without.scheduler):  # work conserving: as long as anything waits, something runs
        ours, theirs = with_one.run(), without.run()
        assert [r.id for r in ours.requests] == [r.id for r in theirs.requests]
    assert not len(with_one.scheduler)
