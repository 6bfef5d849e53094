"""What a client asks of an executor before it believes it, and how its session verifies that.

Ties `symbiosis.client.integrity` (tensors alone) to a session, which answers the questions that
an anchor may take and ends when an answer is wrong.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from symbiosis.client.integrity import Integrity, OwnWord
from symbiosis.client.linking import Ask
from symbiosis.errors import IntegrityError
from symbiosis.wire.exchange import NO_BIAS, Op
from symbiosis.wire.views import Recipe

if TYPE_CHECKING:
    from symbiosis.client.session import Session
    from symbiosis.client.trusted import TrustedFolder


class Trust(NamedTuple):
    """See `symbiosis.connect`."""

    expect_digest: str | None = None
    verify: float = 0.0
    weights: str | None = None

    @classmethod
    def of(cls, expect_digest: str | None, verify: float, weights: str | None) -> Trust:
        """Raises ValueError."""
        if not 0 <= verify <= 1:
            raise ValueError(f"verify is {verify!r}; it is a share of the exchanges, 0 to 1")
        if weights is not None and not verify:
            raise ValueError("weights= is what answers are compared with: give verify= as well")
        return cls(expect_digest, verify, weights)


class Verifier:
    """The random check of one session's products; the session's lock guards it."""

    def __init__(self, session: Session, trust: Trust) -> None:
        """Raises ModelError if the trusted weights cannot be used."""
        self._session: Session = weakref.proxy(session)  # a forgotten session closes at once
        self._trusted: TrustedFolder | None = None
        dtype = getattr(torch, str(session.welcome["dtype"]))
        if trust.weights is not None:
            from symbiosis.client.trusted import TrustedFolder  # needs transformers, for seconds

            self._trusted = TrustedFolder(
                trust.weights, session.welcome, session.weights, session.vectors
            )
        own = OwnWord(self._ask, self._shape, self._biases, dtype)
        self._integrity = Integrity(trust.verify, self._trusted or own, self._name, dtype)

    @property
    def verified(self) -> int:
        """Products compared so far."""
        return self._integrity.checked

    @property
    def unverified(self) -> int:
        """Products that were drawn and have no check."""
        return self._integrity.unchecked

    def exchange(
        self,
        op: Op,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        recipe: Recipe,
        x: Tensor,
        results: tuple[Tensor, ...],
    ) -> None:
        """An exchange but a chain was answered; raises IntegrityError."""
        with self._ending():
            self._integrity.exchange(op, weights, biases, recipe, x, results)

    def chain(self, ask: Ask, x: Tensor, outputs: Tensor) -> None:
        """A chain was answered; raises IntegrityError."""
        with self._ending():
            self._integrity.chain(ask, x, outputs)

    def shipped(self, values: Mapping[str, Tensor]) -> None:
        """The small parameters came; raises IntegrityError if trusted weights differ."""
        if self._trusted is not None:
            with self._ending():
                self._trusted.check_shipped(values)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """The session of an executor that was caught out ends."""
        try:
            yield
        except IntegrityError:
            self._session.close()
            raise

    def _ask(self, op: Op, weight: int, x: Tensor) -> Tensor:
        return self._session._exchange(op, (weight,), (NO_BIAS,), (), (), (x,), False, False)[0]

    def _shape(self, weight: int) -> tuple[int, ...]:
        return self._session.weights[weight].shape

    def _name(self, weight: int) -> str:
        return self._session.weights[weight].names[0]

    def _biases(self) -> dict[int, Tensor]:
        ids = self._session.vectors
        return {ids[name]: v for name, v in self._session.shipped().items() if name in ids}
