"""What an executor says of itself, and what it ships, as checked Python values."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch

from symbiosis.errors import ModelError, ProtocolError
from symbiosis.kernels import Kernels
from symbiosis.transport.channel import Channel
from symbiosis.wire.digest import Entries, bytes_digest, read_entries, tensor_digest
from symbiosis.wire.frames import Json

_POLL_S = 0.05


class WeightInfo(NamedTuple):
    """A hosted weight as the executor describes it."""

    id: int
    names: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int | None = None  # of a matrix that products are computed with: where outputs lie

    @property
    def is_lookup(self) -> bool:
        """Is it a table of embeddings (perhaps an output head too)?"""
        return self.axis is None and len(self.shape) == 2


def weight_table(welcome: Json) -> dict[int, WeightInfo]:
    """The hosted weights by id; raises ProtocolError."""
    try:
        entries = [
            WeightInfo(int(w["id"]), tuple(w["names"]), tuple(w["shape"]), w.get("axis"))
            for w in welcome["weights"]  # type: ignore[attr-defined]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"the executor's welcome has no proper table of weights: {error!r}"
        ) from None
    return {entry.id: entry for entry in entries}


def vector_table(welcome: Json) -> dict[str, int]:
    """The ids of the shipped vectors by name."""
    vectors = welcome.get("vectors")
    return {str(k): int(v) for k, v in vectors.items()} if isinstance(vectors, dict) else {}


def kernels_for_one(welcome: Json) -> Kernels:
    """By what the executor computes a lone client's products; raises ProtocolError."""
    try:
        return Kernels.from_json(welcome.get("onednn", []))
    except ValueError as error:
        raise ProtocolError(f"the executor's welcome names unknown kernels: {error}") from None


def unpack_files(answer: Json, data: bytes) -> dict[str, bytes]:
    """The files that came one after the other in ``data``, by name; raises ProtocolError."""
    sizes = answer.get("files")
    if not isinstance(sizes, dict) or not all(isinstance(s, int) for s in sizes.values()):
        raise ProtocolError("the executor sent no list of files with their sizes")
    if sum(sizes.values()) != len(data) or any(size < 0 for size in sizes.values()):
        raise ProtocolError("the executor's files do not have the sizes that it gave")
    files, at = {}, 0
    for name, size in sizes.items():
        if name in ("", ".", "..") or Path(name).name != name:
            raise ProtocolError(f"the executor sent a file named {name!r}; plain names only")
        files[name] = data[at : at + size]
        at += size
    return files


class Identity(NamedTuple):
    """What an executor says that it hosts."""

    digest: str
    entries: Entries | None  # of what is in it, if they were asked for

    def check_file(self, name: str, data: bytes) -> None:
        """Raises ModelError if the file that arrived is another."""
        self._check(f"file:{name}", bytes_digest(data))

    def check_parameter(self, name: str, value: torch.Tensor) -> None:
        """The same for a shipped parameter; what is computed and not stored has no digest."""
        if self.entries is not None and f"parameter:{name}" in self.entries:
            self._check(f"parameter:{name}", tensor_digest(value))

    def check_weight(self, name: str, value: torch.Tensor) -> None:
        """The same for a whole weight that was fetched."""
        self._check(f"weight:{name}", tensor_digest(value))

    def has_weight(self, name: str, value: torch.Tensor) -> bool:
        """Is that what it hosts under this name? True where entries are not known."""
        return self._has(f"weight:{name}", tensor_digest(value))

    def in_full(self, answer: Json) -> Identity:
        """The same with its entries, which ``answer`` lists. Raises ModelError, ProtocolError."""
        found = read_entries(answer)
        if found is None or found[0] != self.digest:
            raise ModelError(
                f"the executor lists the digests of another model than {self.digest[:16]}…: do "
                f"not use this executor"
            )
        return self._replace(entries=found[1])

    def _has(self, entry: str, found: str) -> bool:
        return self.entries is None or self.entries.get(entry) == found

    def _check(self, entry: str, found: str) -> None:
        if not self._has(entry, found):
            raise ModelError(
                f"the executor sent a {entry.replace(':', ' ')} that is not the one in its digest "
                f"{self.digest[:16]}…: do not use this executor"
            )


def recognise(
    channel: Channel, url: str, expected: str | None, known: Identity | None, before: Json
) -> Identity:
    """What the executor behind a fresh ``channel`` hosts, if it is what was ``expected``, and
    what the session knew ``before`` (its first welcome).

    Waits until the executor has computed its digest. Raises ModelError, ProtocolError, and what
    `Channel.request` raises.
    """
    table = weight_table(channel.welcome)
    found = _identity(channel, with_entries=expected is not None and known is None)
    hosted = channel.welcome.get("model")
    if known is None:
        if expected is not None and found.digest != expected:
            raise ModelError(
                f"{url} hosts {hosted} with the digest {found.digest}, not {expected}: other "
                f"weights, files, dtype or quantisation. Nothing was sent to it"
            )
        return found
    if found.digest != known.digest or table != weight_table(before):
        raise ModelError(
            f"{url} no longer hosts {before.get('model')} as it was, but {hosted} with other "
            f"weights, files, dtype or quantisation: connect anew and build the model again"
        )
    return known


def _identity(channel: Channel, with_entries: bool) -> Identity:
    digest = channel.welcome.get("digest")
    if isinstance(digest, str) and not with_entries:
        return Identity(digest, None)
    while True:
        answer, _ = channel.request({"get": "digest"})
        found = read_entries(answer)
        if found is not None:
            return Identity(found[0], found[1] if with_entries else None)
        time.sleep(_POLL_S)
