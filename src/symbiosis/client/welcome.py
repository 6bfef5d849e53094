"""What an executor says of itself, and what it ships, as checked Python values."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from symbiosis.errors import ProtocolError
from symbiosis.wire.frames import Json


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
