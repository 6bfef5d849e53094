"""The digest of the hosted model, computed once, beside everything else.

Hashing a large model takes seconds, so threads of their own do it while the executor already
listens; a client that wants to compare asks again until it is there. Knows weights and threads;
knows no connections.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from symbiosis.errors import SymbiosisError
from symbiosis.executor.weights import HostedWeight, Weights
from symbiosis.wire.digest import bytes_digest, combined, tensor_digest
from symbiosis.wire.frames import Json

logger = logging.getLogger(__name__)

_THREADS = 4
"""SHA-256 in hardware gives 1 to 2 GB/s for each; more would take the cores from the clients."""


class ModelDigest:
    """The digest of ``weights``; safe to read from any thread."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._entries: dict[str, str] | None = None
        self._error: SymbiosisError | None = None
        self._done = threading.Event()
        self._begun = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin, if nobody has; in the process that serves, for a fork loses the threads."""
        if self._begun.acquire(blocking=False):
            self._thread = threading.Thread(
                target=self._compute, name="symbiosis-digest", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End what is under way, and wait for that: a thread within torch when the interpreter ends
        would abort the process. It can be begun anew."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if not self._done.is_set():
                self._begun.release()
        self._stopping = False

    @property
    def ready(self) -> str | None:
        """The digest, or None while it is being computed."""
        entries = self._entries
        return None if entries is None else combined(entries)

    def wait(self) -> str:
        """The digest, when it is there; raises SymbiosisError if it cannot be computed."""
        self.start()
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._entries is not None
        return combined(self._entries)

    def answer(self) -> Json:
        """For ``{"get": "digest"}``: see `symbiosis.wire.digest.read_entries`."""
        self.start()
        if self._error is not None:
            raise self._error
        entries = self._entries
        if entries is None:
            return {"digest": None}
        return {"digest": combined(entries), "entries": entries}

    def _compute(self) -> None:
        started = time.monotonic()
        try:
            self._entries = self._hashed()
        except _Stopped:
            return
        except (RuntimeError, MemoryError) as error:  # handed to whoever asks
            self._error = SymbiosisError(f"the model's digest could not be computed: {error}")
            logger.error("%s", self._error)
        self._done.set()
        logger.debug("digest computed in %.1f s", time.monotonic() - started)

    def _hashed(self) -> dict[str, str]:
        weights = self._weights
        found = {f"file:{name}": bytes_digest(data) for name, data in weights.files.items()}
        for name in sorted(weights.stored & weights.shipped.keys()):
            found[f"parameter:{name}"] = tensor_digest(weights.shipped[name])
        with ThreadPoolExecutor(_THREADS, "symbiosis-digest") as pool:
            hosted = list(weights)
            for weight, digest in zip(hosted, pool.map(self._of_weight, hosted), strict=True):
                found[f"weight:{weight.names[0]}"] = digest
        return found

    def _of_weight(self, weight: HostedWeight) -> str:
        """Of a quantised weight: of the numbers that it stands for."""
        if self._stopping:
            raise _Stopped
        return tensor_digest(weight.dense())


class _Stopped(Exception):
    """Nobody wants the digest any more."""
