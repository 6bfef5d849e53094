"""Training beside decoders under policy align: when it may run, and in which pieces."""

from __future__ import annotations

import itertools

import pytest

from symbiosis.executor.scheduler import Batch, Request, Scheduler
from symbiosis.wire.exchange import Priority

KEYS = "Eabcdefg"


class Scene:
    """A decoder whose products and gaps take 1 s each, and a trainer that always waits with a
    request of ``rows`` at ``row_s`` each. The decoder pauses for ``pause_s`` after ``burst``
    tokens."""

    def __init__(
        self, share: float, rows: int, row_s: float, pause_s: float = 1.0, burst: int = 1
    ) -> None:
        self.scheduler = Scheduler("align", training_share=share)
        self.rows, self.row_s, self.pause_s, self.burst = rows, row_s, pause_s, burst
        self.now_s = self.decoder_at_s = 0.0
        self.sent = 0
        self.waits_s: list[float] = []
        self.spent_s = {Priority.INTERACTIVE: 0.0, Priority.TRAINING: 0.0}
        self.pieces: list[Batch] = []
        self._ids = itertools.count(1)
        self._decoding = False

    def train(self) -> None:
        self.scheduler.submit(
            Request(
                next(self._ids),
                2,
                "t",
                self.rows,
                Priority.TRAINING,
                self.now_s,
                divisible=True,
            )
        )

    def run(self, until_s: float) -> Scene:
        while self.now_s < until_s:
            if not self._decoding and self.decoder_at_s <= self.now_s:
                key = KEYS[self.sent % len(KEYS)]
                self.scheduler.submit(
                    Request(
                        next(self._ids), 1, key, 1, Priority.INTERACTIVE, self.now_s, key == "E"
                    )
                )
                self.sent += 1
                self._decoding = True
            batch = self.scheduler.next_batch(self.now_s)
            if batch is None:
                wake_s = self.scheduler.wake_at(self.now_s)
                assert not self._decoding, "a lone decoder is never held"
                assert wake_s is None or wake_s > self.now_s
                self.now_s = min(self.decoder_at_s, wake_s or self.decoder_at_s)
            else:
                self._compute(batch)
        return self

    def _compute(self, batch: Batch) -> None:
        training = batch.priority is Priority.TRAINING
        elapsed_s = batch.rows * self.row_s if training else 1.0
        if not training:
            self.waits_s.append(self.now_s - self.decoder_at_s)
        self.now_s += elapsed_s
        self.spent_s[batch.priority] += elapsed_s
        self.scheduler.finished(batch, self.now_s, elapsed_s)
        if training:
            self.pieces.append(batch)
            if batch.completes:
                self.train()
        else:
            self._decoding = False
            ends = self.sent % (self.burst * len(KEYS)) == 0
            self.decoder_at_s = self.now_s + (self.pause_s if ends else 1.0)


def test_training_that_would_not_be_done_in_time_waits_for_the_decoder() -> None:
    scene = Scene(share=0.0, rows=512, row_s=1 / 8).run(100)  # pieces of 64 rows, 8 s
    scene.train()
    scene.run(200)
    before = scene.spent_s[Priority.TRAINING]
    scene.run(400)
    assert scene.spent_s[Priority.TRAINING] == before


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_it_is_owed_a_share_of_the_time_all_the_same(share: float) -> None:
    scene = Scene(share=share, rows=512, row_s=1 / 64).run(100)
    scene.train()
    scene.run(3000)
    assert scene.spent_s[Priority.TRAINING] / 2900 == pytest.approx(share, abs=0.07)


def test_it_runs_between_the_tokens_of_a_reader() -> None:
    scene = Scene(share=0.0, rows=512, row_s=1 / 64, pause_s=60.0).run(300)
    scene.train()
    scene.run(3000)
    idle = 60 / (60 + 15)
    assert scene.spent_s[Priority.TRAINING] / 2700 > 0.8 * idle


def test_nobody_waits_for_who_is_away() -> None:
    """Five tokens, and then nothing for ten minutes, again and again."""
    scene = Scene(share=0.0, rows=512, row_s=1 / 64, pause_s=600.0, burst=5).run(3000)
    scene.train()
    scene.run(10_000)
    idle = 600 / (600 + 5 * 16)
    assert scene.spent_s[Priority.TRAINING] / 7000 > 0.9 * idle


def test_a_decoder_waits_for_one_piece_at_most() -> None:
    scene = Scene(share=0.3, rows=8000, row_s=1 / 128).run(300)
    scene.train()
    scene.run(340)
    scene.waits_s.clear()
    scene.run(3000)
    longest_s = max(piece.rows for piece in scene.pieces[4:]) / 128
    assert longest_s <= 8.0, "eight of the decoder's own products"
    assert 0 < max(scene.waits_s) <= longest_s + 1e-9


def test_alone_it_is_computed_whole() -> None:
    scene = Scene(share=0.2, rows=8000, row_s=1 / 128)
    scene.decoder_at_s = 1e9
    scene.train()
    scene.run(300)
    assert not any(piece.is_piece for piece in scene.pieces)


def test_training_that_left_while_it_waited_is_owed_nothing_for_it() -> None:
    """A trainer that goes while it waits for a decoder; then nobody sends anything for an hour."""
    scene = Scene(share=0.3, rows=512, row_s=1 / 8, pause_s=20.0).run(100)
    scene.train()
    scheduler = scene.scheduler
    while scheduler._resting_since_s is None:
        scene.run(scene.now_s + 1)
    scheduler.remove_client(2)
    scene.decoder_at_s = scene.now_s = scene.now_s + 3600
    scene.run(scene.now_s + 100)
    scene.waits_s.clear()
    scene.train()
    scene.run(scene.now_s + 300)
    assert max(scene.waits_s) <= 64 + 8, "a piece, not an hour"
