"""Policy align: who is held, for how long, and for whom; virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.executor.rhythm import LATE
from symbiosis.executor.scheduler import Batch, Policy, Request, Scheduler, Terms
from symbiosis.wire.exchange import Priority

COST_S = 1.0  # of any batch: decoding reads the weight, whoever joins
GAP_S = 0.4
LAYERS = "abcdefgh"


@dataclass
class Decoder:
    """Sends its keys over and over, a gap after each answer, a pause after each round."""

    number: int
    keys: str = "E" + LAYERS
    gap_s: float = GAP_S
    pause_s: float = GAP_S
    starts_s: float = 0.0
    noise: float = 0.0
    sent: int = 0


class Run:
    """Decoders against a scheduler. ``held_s[client]``: for each token, how long its requests
    waited while nothing at all was computed."""

    def __init__(self, decoders: list[Decoder], policy: Policy = "align", seed: int = 0) -> None:
        self.scheduler = Scheduler(policy)
        self.decoders = {decoder.number: decoder for decoder in decoders}
        self.now_s = 0.0
        self.batches: list[Batch] = []
        self.held_s: dict[int, list[float]] = defaultdict(list)
        self.ends_s: dict[int, list[float]] = defaultdict(list)
        self._random = Random(seed)
        self._ids = itertools.count(1)
        self._coming = [(decoder.starts_s, decoder.number) for decoder in decoders]
        self._waiting: set[int] = set()

    def until(self, end_s: float) -> Run:
        heapq.heapify(self._coming)
        while self.now_s < end_s:
            while self._coming and self._coming[0][0] <= self.now_s:
                self._send(heapq.heappop(self._coming)[1])
            batch = self.scheduler.next_batch(self.now_s)
            if batch is None:
                self._wait()
            else:
                self._compute(batch)
        return self

    def stall(self, number: int) -> None:
        """From now on it sends nothing."""
        self._coming = [(at_s, client) for at_s, client in self._coming if client != number]

    def resume(self, number: int) -> None:
        self._coming.append((self.now_s, number))

    def mean_batch(self, last: int) -> float:
        return sum(len(batch.requests) for batch in self.batches[-last:]) / last

    def _send(self, number: int) -> None:
        decoder = self.decoders[number]
        key = decoder.keys[decoder.sent % len(decoder.keys)]
        if decoder.sent % len(decoder.keys) == 0:
            self.held_s[number].append(0.0)
        decoder.sent += 1
        self._waiting.add(number)
        request = Request(
            next(self._ids), number, key, 1, Priority.INTERACTIVE, self.now_s, key == "E"
        )
        self.scheduler.submit(request)

    def _wait(self) -> None:
        wake_s = self.scheduler.wake_at(self.now_s)
        assert (wake_s is None) == (not self._waiting)
        assert wake_s is None or wake_s > self.now_s
        next_s = self._coming[0][0] if self._coming else math.inf
        then_s = min(next_s, math.inf if wake_s is None else wake_s)
        for number in self._waiting:
            self.held_s[number][-1] += then_s - self.now_s
        self.now_s = then_s

    def _compute(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.now_s += COST_S
        for request in batch.requests:
            self._waiting.remove(request.client)
            decoder = self.decoders[request.client]
            ends = decoder.sent % len(decoder.keys) == 0
            if ends:
                self.ends_s[request.client].append(self.now_s)
            gap_s = decoder.pause_s if ends else decoder.gap_s
            gap_s *= 1 + decoder.noise * self._random.random()
            heapq.heappush(self._coming, (self.now_s + gap_s, request.client))
        self.scheduler.finished(batch, self.now_s, COST_S)


def out_of_phase(count: int, **fields: float) -> list[Decoder]:
    return [Decoder(i, starts_s=3.3 * i, **fields) for i in range(count)]  # type: ignore[arg-type]


def test_decoders_come_into_phase_and_stay_there() -> None:
    aligned = Run(out_of_phase(4, noise=0.3)).until(400)
    assert aligned.mean_batch(100) > 3.5
    greedy = Run(out_of_phase(4, noise=0.3), "greedy").until(400)
    assert greedy.mean_batch(100) < 1.5
    assert sum(map(len, aligned.ends_s.values())) > 1.5 * sum(map(len, greedy.ends_s.values()))


@settings(max_examples=50)
@given(
    gap_s=st.floats(0, 5), pause_s=st.floats(0, 30), noise=st.floats(0, 10), seed=st.integers(0, 99)
)
def test_a_lone_decoder_is_never_held(
    gap_s: float, pause_s: float, noise: float, seed: int
) -> None:
    run = Run([Decoder(1, gap_s=gap_s, pause_s=pause_s, noise=noise)], seed=seed).until(200)
    assert sum(run.held_s[1]) == 0.0


def test_who_is_left_alone_is_never_held() -> None:
    run = Run(out_of_phase(3)).until(200)
    for number in (1, 2):
        run.stall(number)
        run.scheduler.remove_client(number)
        run._waiting.discard(number)
    run.until(220)
    before = len(run.held_s[0])
    run.until(400)
    assert sum(run.held_s[0][before:]) == 0.0


@settings(max_examples=60)
@given(
    decoders=st.lists(
        st.builds(
            Decoder,
            number=st.just(0),
            keys=st.sampled_from(["Eabcdefgh", "Eabcdefghx", "Eaybcdzefgh", "abc", "E", "Eababab"]),
            gap_s=st.floats(0, 3),
            pause_s=st.floats(0, 20),
            noise=st.floats(0, 4),
            starts_s=st.floats(0, 30),
        ),
        min_size=2,
        max_size=6,
    ),
    seed=st.integers(0, 999),
)
def test_no_token_is_held_for_longer_than_a_token_takes(decoders: list[Decoder], seed: int) -> None:
    for number, decoder in enumerate(decoders):
        decoder.number = number
    run = Run(decoders, seed=seed).until(300)
    for decoder in decoders:
        n, others = len(decoder.keys), len(decoders) - 1
        gap_s = decoder.gap_s * (1 + decoder.noise)
        work_s = n * COST_S * (1 + others) + (n - 1) * gap_s  # at most, behind all the others
        assert max(run.held_s[decoder.number], default=0.0) <= work_s + 1e-6


@pytest.mark.parametrize("at", [3, 9])  # amid a token, and between two
def test_a_stalled_decoder_costs_the_others_one_hold(at: int) -> None:
    run = Run(out_of_phase(4, noise=0.2)).until(400)
    assert run.mean_batch(40) > 3.5
    while run.decoders[3].sent % 9 != at % 9 or 3 in run._waiting:
        run.until(run.now_s + 0.1)
    run.stall(3)
    tokens = {number: len(run.held_s[number]) for number in range(3)}
    run.until(run.now_s + 300)
    usual_s = 9 * GAP_S * 0.2  # the noise of the others
    for number, before in tokens.items():
        after = run.held_s[number][before - 1 :]
        assert sum(held_s > usual_s + COST_S for held_s in after) <= 1
        assert max(after) <= usual_s + LATE * GAP_S * 1.2
    assert run.mean_batch(40) > 2.8


def test_a_stalled_decoder_that_comes_back_is_aligned_again() -> None:
    run = Run(out_of_phase(3, noise=0.2)).until(300)
    run.stall(2)
    run.until(500)
    assert 1.8 < run.mean_batch(40) <= 2.0
    run.resume(2)
    run.until(900)
    assert run.mean_batch(40) > 2.7


def test_different_adapters_share_what_they_have_in_common() -> None:
    decoders = out_of_phase(4, noise=0.1)
    for decoder in decoders[2:]:
        decoder.keys = "Eabxcdefgh"
    run = Run(decoders).until(600)
    assert run.mean_batch(120) > 2.5


def test_a_slow_reader_does_not_slow_down_a_fast_decoder() -> None:
    alone = Run([Decoder(0)]).until(600)
    both = Run([Decoder(0), Decoder(1, pause_s=60.0)]).until(600)
    assert len(both.ends_s[0]) > 0.8 * len(alone.ends_s[0])


def test_a_client_with_a_deadline_of_nothing_is_not_held() -> None:
    run = Run(out_of_phase(4, noise=0.3))
    run.scheduler.admit(0, Terms(deadline_s=0.0))
    run.until(400)
    assert sum(run.held_s[0]) == 0.0
    assert any(sum(run.held_s[number]) > 0.0 for number in (1, 2, 3))


def test_a_client_of_more_weight_is_served_more_often() -> None:
    scheduler = Scheduler("greedy")
    scheduler.admit(1, Terms(weight=2.0))
    numbers = itertools.count(1)
    served: dict[int, int] = defaultdict(int)

    def submit(client: int) -> None:
        scheduler.submit(Request(next(numbers), client, f"k{client}", 1, Priority.INTERACTIVE, 0.0))

    for client in (1, 2, 3, 4, 5):
        submit(client)
    for _ in range(600):
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        served[batch.requests[0].client] += 1
        submit(batch.requests[0].client)
    assert 1.2 < served[1] / served[2] <= 2.0
    assert min(served.values()) > 80, "and nobody starves"
