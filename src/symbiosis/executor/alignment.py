"""Who waits for whom: bounded holds that bring decoders into phase and keep them there.

Decoders at different layers cannot share a batch. One that is held at the start of a token until
the others come by goes on with them through all layers; at the later exchanges it waits for those
who are just behind. Nobody waits for a client that is late, that is not expected in time, or
that has not shown a regular rhythm; a client alone waits for nobody.

How long is worth it: at the start of a token, **no longer than one would wait behind the others**
if nobody waited for anybody; later, no longer than the batch takes that is saved. Knows
`Rhythm`s; knows nothing of queues, rows or priorities.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

from symbiosis.executor.rhythm import Recent, Rhythm

REACH = 2
"""Within a token, those are waited for who are at most so many exchanges behind."""


class Alignment:
    """The rhythms of all clients that send interactive exchanges, and the holds they justify."""

    def __init__(self) -> None:
        self._rhythms: dict[int, Rhythm] = {}
        self._load = 0.0
        self._looked_s = self._trained_s = -math.inf
        self.batch_s = Recent(32)  # what interactive batches took
        self.holds = 0  # exchanges that were held
        self.held_s = 0.0  # and for how long, in sum

    @property
    def clients(self) -> int:
        """How many clients send interactive exchanges."""
        return len(self._rhythms)

    def arrived(
        self, client: int, key: Hashable, opens: bool, now_s: float, walks: bool = False
    ) -> None:
        """A client has sent an interactive exchange; or, if it ``walks``, one goes on."""
        rhythm = self._rhythms.get(client)
        if rhythm is None:
            rhythm = self._rhythms[client] = Rhythm()
        rhythm.arrived(key, opens, now_s, self._looked_s, walks)
        if rhythm.at_start:
            self._load = sum(
                r.load for r in self._rhythms.values() if r.regular and r.late_s > now_s
            )

    def answered(self, client: int, elapsed_s: float, now_s: float) -> None:
        """A client's interactive exchange has been computed."""
        if (rhythm := self._rhythms.get(client)) is not None:
            rhythm.answered(elapsed_s, now_s)

    def left(self, client: int) -> None:
        self._rhythms.pop(client, None)

    def was_held(self, client: int, seconds: float) -> None:
        """A client's exchange is let go after ``seconds``."""
        self._rhythms[client].held_s += seconds
        self.holds += 1
        self.held_s += seconds

    def looked(self, now_s: float) -> None:
        """A batch starts: what comes until it has run is seen only then."""
        self._looked_s = now_s

    def trained(self, now_s: float) -> None:
        """A training batch has run: training wants all the time that decoding leaves."""
        self._trained_s = now_s

    def release_s(
        self, key: Hashable, clients: dict[int, float], deadline_s: float, now_s: float
    ) -> float:
        """Until when ``clients`` (to their times of arrival), who all wait with ``key``, are held
        for others; in the past if they are not."""
        if len(self._rhythms) <= len(clients):
            return now_s
        for client, arrived_s in clients.items():
            rhythm = self._rhythms[client]
            deadline_s = min(deadline_s, arrived_s + self._patience_s(rhythm) - rhythm.held_s)
        at_start = any(self._rhythms[client].at_start for client in clients)
        if not at_start and not any(self._beside_training(self._rhythms[c]) for c in clients):
            deadline_s = min(deadline_s, min(clients.values()) + self.batch_s.typical)
        if deadline_s <= now_s:
            return now_s
        until_s = now_s
        for client, other in self._rhythms.items():
            if client not in clients and self._will_come(other, key, at_start, deadline_s, now_s):
                until_s = max(until_s, min(deadline_s, other.late_s))
                if until_s == deadline_s:
                    break
        return until_s

    def idle_until(self, now_s: float) -> tuple[float, float]:
        """When the next interactive exchange is expected, and when to give that up."""
        expected_s = late_s = math.inf
        for rhythm in self._on_the_way(now_s):
            expected_s = min(expected_s, rhythm.expected_s)
            late_s = min(late_s, rhythm.late_s)
        return expected_s, late_s

    def anyone_but(self, client: int, now_s: float) -> bool:
        """Is another client than ``client`` decoding?"""
        return any(other != client for other in self.decoding(now_s))

    def decoding(self, now_s: float) -> Iterator[int]:
        """The clients that wait for an exchange, or are not late with the next one."""
        for client, rhythm in self._rhythms.items():
            if rhythm.answered_s is None or rhythm.late_s > now_s:
                yield client

    def _will_come(
        self, other: Rhythm, key: Hashable, at_start: bool, deadline_s: float, now_s: float
    ) -> bool:
        if not other.regular or other.late_s <= now_s:
            return False
        steps = other.steps_to(key)
        if steps is None or (steps > REACH and not at_start):
            return False
        return other.reaches_s(steps, now_s) <= deadline_s

    def _patience_s(self, rhythm: Rhythm) -> float:
        """How long a client may be held in one token: what it would wait behind the others whose
        exchanges come at random (Pollaczek and Khinchine, constant service), at most the token."""
        others = self._load - (rhythm.load if rhythm.regular else 0.0)
        full = others >= 1 or self._beside_training(rhythm)
        behind_s = math.inf if full else rhythm.busy_s * others / (2 * (1 - others))
        return min(rhythm.work_s.typical, behind_s)

    def _beside_training(self, rhythm: Rhythm) -> bool:
        """Has training run since its token began? Then the executor's time is always wanted."""
        return self._trained_s >= rhythm.started_s

    def _on_the_way(self, now_s: float) -> list[Rhythm]:
        return [
            rhythm
            for rhythm in self._rhythms.values()
            if rhythm.regular and rhythm.answered_s is not None and rhythm.late_s > now_s
        ]
