"""Which weights are applied to the very same input, learned by watching.

q/k/v and gate/up read one tensor; asked for together they cost one exchange instead of three or
two. No model-specific code: a run of products with an identical input (same memory, same
version, same shape) is remembered, and next time its first member asks for all. A remembered
group that is not used in full wastes a little compute and is forgotten; it never changes a
result, because each member's product is computed by itself. Pure: knows no tensors, no sockets.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Member = TypeVar("Member", bound=Hashable)


class InputGroups(Generic[Member]):
    """Learns runs of members that share an input. Not thread-safe; the session guards it."""

    def __init__(self) -> None:
        self._groups: dict[Member, tuple[Member, ...]] = {}
        self._input: Hashable = None
        self._run: list[Member] = []

    def observe(self, input_key: Hashable, member: Member) -> None:
        """``member`` was applied to the input that ``input_key`` identifies."""
        if input_key == self._input and input_key is not None:
            if member not in self._run:
                self._run.append(member)
            return
        self._learn()
        self._input, self._run = input_key, [member]

    def members(self, leader: Member) -> tuple[Member, ...]:
        """What to ask for when ``leader`` is the first to see an input; ``leader`` is first."""
        return self._groups.get(leader, (leader,))

    def _learn(self) -> None:
        if len(self._run) > 1:
            self._groups[self._run[0]] = tuple(self._run)
        elif self._run:
            self._groups.pop(self._run[0], None)
