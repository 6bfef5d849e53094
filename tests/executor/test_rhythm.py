"""One client's rhythm: where tokens start, what comes next, when it is late."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from symbiosis.executor.rhythm import LATE, Recent, Rhythm


def play(rhythm: Rhythm, keys: Iterable[str], now_s: float = 0.0, gap_s: float = 1.0) -> list[int]:
    """Send ``keys``, each computed in 1 s and followed by a gap; where a token was seen to start.
    Keys in upper case are embedding lookups."""
    starts = []
    for i, key in enumerate(keys):
        rhythm.arrived(key, key.isupper(), now_s, -math.inf)
        if rhythm.at_start:
            starts.append(i)
        rhythm.answered(1.0, now_s + 1.0)
        now_s += 1.0 + gap_s
    return starts


def test_a_token_starts_with_an_embedding() -> None:
    assert play(Rhythm(), "EabaEabaEaba") == [0, 4, 8]


def test_without_one_a_token_starts_where_a_key_comes_back() -> None:
    assert play(Rhythm(), "abcdabcdabcd") == [4, 8]


def test_layers_that_share_weights_start_no_token_after_an_embedding() -> None:
    assert play(Rhythm(), "Eababab" * 3) == [0, 7, 14]


def test_a_lookup_that_has_become_part_of_a_chain() -> None:
    """The chain opens tokens from then on; a second lookup in a token still opens none."""
    rhythm = Rhythm()
    play(rhythm, "Eabcdefgh" * 3)
    starts = play(rhythm, "Cdh" * 8, 100.0)
    assert starts[0] <= 9  # after as many exchanges as a token had
    assert {b - a for a, b in itertools.pairwise(starts)} == {3}
    assert rhythm.regular
    assert play(Rhythm(), "EPabEPabEPab") == [0, 4, 8]


def test_a_changed_adapter_is_learned_anew() -> None:
    rhythm = Rhythm()
    play(rhythm, "abc" * 4)
    starts = play(rhythm, "xyzw" * 6, 100.0)
    assert starts
    assert {b - a for a, b in itertools.pairwise(starts)} == {4}


def test_what_comes_next() -> None:
    rhythm = Rhythm()
    play(rhythm, "Eabc" * 3 + "Ea")
    assert [rhythm.steps_to(key) for key in "bcEa"] == [0, 1, 2, 3]
    assert rhythm.steps_to("x") is None


def test_a_regular_client_is_due_and_then_late() -> None:
    rhythm = Rhythm()
    play(rhythm, "Eabc" * 3 + "Ea")
    assert rhythm.regular
    assert rhythm.expected_s == 28.0  # the last answer came at 27
    assert rhythm.late_s == 27.0 + LATE
    rhythm.arrived("b", False, 28.0, -math.inf)
    assert rhythm.late_s == math.inf, "it waits for us"


def test_after_a_stall_it_is_regular_again_with_its_next_whole_token() -> None:
    rhythm = Rhythm()
    play(rhythm, "Eabc" * 3 + "Ea")
    play(rhythm, "bc", 100.0)
    assert not rhythm.regular
    play(rhythm, "E", 104.0)
    assert not rhythm.regular, "the token with the stall has just ended"
    play(rhythm, "abcE", 106.0)
    assert rhythm.regular


def test_what_came_during_a_batch_is_not_held_against_it() -> None:
    rhythm = Rhythm()
    play(rhythm, "Eabc" * 3 + "Ea")
    rhythm.arrived("b", False, 90.0, looked_s=27.5)  # seen after a batch from 27.5 to 90
    play(rhythm, "cE", 91.0)
    assert rhythm.regular


def test_unique_keys_do_not_fill_the_memory() -> None:
    rhythm = Rhythm()
    for i in range(10_000):
        rhythm.arrived(i, False, float(i), -math.inf)
    assert len(rhythm._keys) <= 4096


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=80), st.integers(1, 40))
def test_recent_is_a_sliding_window(values: list[float], size: int) -> None:
    recent = Recent(size)
    for value in values:
        recent.add(value)
    last = sorted(values[-size:])
    assert recent.typical == last[len(last) // 2]
    assert recent.most == last[len(last) * 9 // 10]
    assert last[0] <= recent.typical <= recent.most <= last[-1]


def test_what_follows_in_the_executor_is_a_step_of_the_token_but_no_gap() -> None:
    """A chain of a, b and c, each computed for 1/8 s, and then a gap of 1/2 s."""
    rhythm, now_s = Rhythm(), 0.0
    for key in "Eabc" * 5 + "Eab":
        rhythm.arrived(key, key.isupper(), now_s, -math.inf, walks=key in "bc")
        rhythm.answered(0.125, now_s + 0.125)
        now_s += 0.125 if key in "ab" else 0.625
    assert rhythm.regular
    assert [rhythm.steps_to(key) for key in "cEab"] == [0, 1, 2, 3]
    assert rhythm.late_s == now_s + LATE * 0.5


def test_an_absence_is_no_gap() -> None:
    """Somebody who asks for a few tokens every minute is late soon after the last of them."""
    rhythm = Rhythm()
    for minute in range(8):
        play(rhythm, "Eabc" * 5, 60.0 * minute, gap_s=0.25)
        answered_s = rhythm.answered_s
        assert answered_s is not None
        assert rhythm.late_s == answered_s + LATE * 0.25
    assert rhythm.regular
