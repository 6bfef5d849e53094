"""Where a decoding client should run, and where its cache should lie: from measured times.

A token costs what it costs with an empty cache (executor, exchanges, the client's own layers), and
reading the cache: its bytes over the rate at which the attention of that place reads them, or over
the rate of the link if the cache lies in host memory and the client on a GPU (transformers'
offloaded cache). A GPU makes the first part short; a long context may not fit into it, and then
the choice is between a slow link and the memory of the host, where NEO (arXiv 2411.01142) and
FastDecode (arXiv 2403.11421) put the attention itself.

Pure: `symbiosis.jobs.measuring` finds the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Bound = Literal["executor", "wire", "client", "cache", "link"]


class CacheLayer(NamedTuple):
    """What one layer keeps of a sequence."""

    bytes_per_token: int
    window: int | None = None  # it keeps no more tokens than that


def cache_bytes(layers: Sequence[CacheLayer], context: int, batch: int) -> int:
    """Of ``batch`` sequences of ``context`` tokens."""
    kept = (min(context, layer.window or context) * layer.bytes_per_token for layer in layers)
    return batch * sum(kept)


@dataclass(frozen=True)
class Place:
    """A device on which a client of this executor can run, as measured there."""

    device: str
    executor_s: float
    """Per token with a short context: the executor's products, and the queue before them."""
    wire_s: float
    """Per token: the exchanges but for what the executor computes."""
    client_s: float
    """Per token: everything that is not an exchange."""
    cache_bytes_per_s: float
    """At which a token's attention gets through a cache in this device's own memory."""
    free_bytes: int
    """Of that memory, with the client in it."""
    upload_bytes_per_s: float | None = None
    """From host memory into it; None where the two are one."""


@dataclass(frozen=True)
class Option:
    """One way to run the client, and what it is expected to cost."""

    device: str
    cache: Literal["device", "host"]
    cache_bytes: int
    free_bytes: int
    """Where the cache would lie."""
    parts_s: dict[Bound, float]
    """Of a token."""

    @property
    def token_s(self) -> float:
        """transformers' offloaded cache brings the next layer in beside the computation, and copies
        each layer back, whole, in line with it: the link adds once."""
        return sum(self.parts_s.values())

    @property
    def bound(self) -> Bound:
        """What takes most of the token."""
        return max(self.parts_s, key=lambda part: self.parts_s[part])

    @property
    def fits(self) -> bool:
        return self.cache_bytes <= self.free_bytes


def options(
    layers: Sequence[CacheLayer],
    places: Sequence[Place],
    context: int,
    batch: int = 1,
    *,
    host_free_bytes: int,
) -> list[Option]:
    """All ways, the best first: those whose cache fits, by the time that a step of ``batch`` tokens
    takes, one of each sequence. ``places`` are measured with that batch; ``host_free_bytes`` is
    for caches in host memory under a client on a GPU.
    """
    needed = cache_bytes(layers, context, batch)
    found = []
    for place in places:
        parts_s: dict[Bound, float] = {
            "executor": place.executor_s,
            "wire": place.wire_s,
            "client": place.client_s,
            "cache": needed / place.cache_bytes_per_s,
        }
        found.append(Option(place.device, "device", needed, place.free_bytes, parts_s))
        if place.upload_bytes_per_s is not None:
            offloaded_s = {**parts_s, "link": needed / place.upload_bytes_per_s}
            found.append(Option(place.device, "host", needed, host_free_bytes, offloaded_s))
    return sorted(found, key=lambda option: (not option.fits, option.token_s))
