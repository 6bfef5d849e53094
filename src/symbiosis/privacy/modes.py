"""Privacy modes: what a client asks for, and what it is told about what it got.

Knows words and numbers; does nothing. What the modes promise is tested by attacks in
``tests/privacy``; the reasons are in decision 12.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

Bits = Literal[8, 16]
"""Of the integers that stand for a weight; see `symbiosis.privacy.ring`."""

Mode = Literal["plain", "noise", "masked-local", "masked-split"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """How a session hides activations from whoever runs the executor.

    ``plain`` hides nothing. ``masked-local`` and ``masked-split`` send uniform integers alone:
    the product with a mask, which is subtracted from the answer, is computed by the client, which
    has the (open) weights, or by a second executor, of another operator, which sees masks alone.
    ``noise`` is the published additive scheme, for fidelity: obfuscation, and no more.
    """

    mode: Mode = "plain"
    bits: Bits = 8
    """Masked modes: of the weights' integers. 8 is modulo 2^32, 16 modulo 2^48, near fp32."""
    buckets: Literal["powers"] | tuple[int, ...] | None = None
    """Pad the rows of every exchange to a power of two, or to one of these sizes (beyond the
    largest: to its multiples), so that sizes tell less about lengths."""
    helper: str | None = None
    """``masked-split``: the address of the second executor."""
    weights: str | Path | None = None
    """A folder of safetensors with the hosted weights. Without it the client fetches what it
    needs: the embedding, and in ``masked-local`` and ``noise`` every weight."""
    ahead: int = 256 << 20
    """Masked modes: bytes of masks that are prepared before they are needed; 0: none."""
    sigma: float = 1000.0
    """``noise``: its standard deviation, in units of the rms of a layer's first input."""
    pool: int | None = None
    """``noise``: draw from so many vectors for each layer; None: fresh noise for each token."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"privacy mode is {self.mode!r}; use one of {', '.join(MODES)}")
        if self.bits not in get_args(Bits):
            raise ValueError(f"privacy bits are {self.bits!r}; use 8 or 16")
        if (self.helper is not None) != (self.mode == "masked-split"):
            raise ValueError(
                "masked-split needs the address of a second executor as its helper, and no other "
                "mode takes one"
            )
        if self.buckets is not None and not _are_buckets(self.buckets):
            raise ValueError(f"buckets are {self.buckets!r}; use 'powers' or rising sizes above 0")
        if self.ahead < 0 or self.sigma <= 0 or (self.pool is not None and self.pool < 1):
            raise ValueError("ahead must be 0 or more, sigma above 0, pool at least 1")

    @classmethod
    def of(cls, given: Mode | Privacy | None) -> Privacy:
        """A mode by its name, or as it is. Raises ValueError."""
        return given if isinstance(given, Privacy) else cls(mode=given or "plain")

    @property
    def is_masked(self) -> bool:
        return self.mode.startswith("masked")

    @property
    def is_plain(self) -> bool:
        """Is this an ordinary session?"""
        return self.mode == "plain" and self.buckets is None

    def padded(self, rows: int) -> int:
        """The size of the bucket for so many rows."""
        if self.buckets is None or rows == 0:
            return rows
        if self.buckets == "powers":
            return 1 << (rows - 1).bit_length()
        at = bisect.bisect_left(self.buckets, rows)
        if at < len(self.buckets):
            return self.buckets[at]
        return -(-rows // self.buckets[-1]) * self.buckets[-1]


def _are_buckets(given: object) -> bool:
    if not isinstance(given, tuple):
        return given == "powers"
    rising = all(a < b for a, b in zip((0, *given), given, strict=False))
    return rising and bool(given)


class Traffic(Protocol):
    """What a session has sent, as `symbiosis.client.counters.SessionStats` counts it."""

    @property
    def exchanges(self) -> int: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...


class MaskUse(NamedTuple):
    """What became of a session's masks."""

    used: int = 0
    prepared: int = 0  # of those used: complete before they were needed
    dropped: int = 0  # prepared and never used; nobody ever uses them
    bytes_for_products: int = 0  # received from the helper


@dataclass(frozen=True)
class PrivacyReport:
    """What one session promises, on what assumptions, and what it has done so far."""

    mode: Mode
    guarantee: str
    assumptions: tuple[str, ...]
    leaks: tuple[str, ...]  # what whoever runs the executor still learns
    mask_source: str  # who computes the products with masks
    exchanges: int
    bytes_sent: int
    bytes_received: int
    masks: MaskUse

    def __str__(self) -> str:
        lines = [f"privacy mode {self.mode}: {self.guarantee}"]
        lines += [f"  assumes: {text}" for text in self.assumptions]
        lines += [f"  still leaks: {text}" for text in self.leaks]
        lines.append(
            f"  {self.exchanges:,} exchanges, {self.bytes_sent:,} bytes sent, "
            f"{self.bytes_received:,} received"
        )
        if self.mode.startswith("masked"):
            m = self.masks
            lines.append(
                f"  {m.used:,} masks used, each once, {m.prepared:,} of them prepared ahead; "
                f"their products are computed by {self.mask_source}"
            )
        return "\n".join(lines)


_GUARANTEES: dict[Mode, str] = {
    "plain": "none; whoever runs the executor sees every activation and gradient, from which "
    "prompts, labels and adapters can be computed",
    "noise": "none that can be proven; activations are obfuscated by additive noise, which "
    "whoever runs the executor can remove in part or, from a pool, altogether",
    "masked-local": "to whoever runs the executor, what is sent cannot be told from uniformly "
    "random integers: nothing of tokens, activations, gradients or adapters but what leaks below",
    "masked-split": "to whoever runs the executor or the helper, but not both, what is sent cannot "
    "be told from uniformly random integers: nothing of tokens, activations, gradients or adapters "
    "but what leaks below",
}

_SIZES = "the number of rows of each exchange, and with it the lengths of prompts and batches"
_BUCKETS = "the bucket of each exchange's rows"
_ALWAYS = (
    "which layers are called, in which order, forward or backward, how often and when: the method "
    "of tuning, the number of tokens that are generated",
    "this client's name, which the commands make of a folder's unless --name is given, its process "
    "number and its address",
)
_HELPER_TOO = "all of that to the helper as well"
_EVERYTHING = "tokens, activations, gradients, the adapter's product: see the guarantee"

_SOUND = "AES-256 and this machine's random numbers are sound"
_HONEST = (
    "the weights are what you take them for (weights=, expect_digest=) and answers are right: "
    "masks do not show false ones, which spoil text or adapter, and what is asked next may depend "
    "on them"
)

_ASSUMPTIONS: dict[Mode, tuple[str, ...]] = {
    "plain": (),
    "noise": (),
    "masked-local": (_SOUND, _HONEST),
    "masked-split": (
        "the operators of executor and helper do not tell each other what they see",
        "nobody who sees the traffic with the executor can read that with the helper (use TLS)",
        _SOUND,
        _HONEST,
    ),
}

_MASK_SOURCES: dict[Mode, str] = {
    "plain": "nobody",
    "noise": "this client, which has the weights",
    "masked-local": "this client, which has the weights",
    "masked-split": "the helper",
}


def report_of(privacy: Privacy, traffic: Traffic, masks: MaskUse | None = None) -> PrivacyReport:
    """The report of a session in that mode."""
    mode = privacy.mode
    sizes = _SIZES if privacy.buckets is None else _BUCKETS
    open_ = () if privacy.is_masked else (_EVERYTHING,)
    shared = (_HELPER_TOO,) if mode == "masked-split" else ()
    return PrivacyReport(
        mode,
        _GUARANTEES[mode],
        _ASSUMPTIONS[mode],
        (*open_, sizes, *_ALWAYS, *shared),
        _MASK_SOURCES[mode],
        traffic.exchanges,
        traffic.bytes_sent,
        traffic.bytes_received,
        masks or MaskUse(),
    )
