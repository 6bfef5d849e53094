"""Masks with their products, prepared before they are needed.

A client asks for the same sites again and again: each token, each step. So whenever a mask is
taken for a site, the next one for it is begun in a thread of its own, in the order of use, off the
path of the exchanges. A mask leaves the pool when it is taken and never comes back, whatever
happens to the exchange that it was taken for. Knows masks; who computes products is told to it.

Shapes: T rows, I in, O out.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from symbiosis.errors import ConnectionLost
from symbiosis.privacy.masks import MaskName, MaskStream, expand, generation
from symbiosis.privacy.modes import MaskUse
from symbiosis.privacy.ring import RESIDUE_BYTES
from symbiosis.wire.exchange import Op

_PATIENCE_S = 5.0
_MOST_SITES = 1 << 14  # of which is known when they were used last


class Site(NamedTuple):
    """Where masks are used: one operation on some weights that share an input of one size."""

    op: Op  # RING_LINEAR or RING_MATMUL
    weights: tuple[int, ...]
    rows: int
    width: int  # I
    outputs: int  # the sum of O over the weights
    bits: int

    @property
    def num_bytes(self) -> int:
        """Of a mask and its products, as they travel."""
        return self.rows * (self.width + self.outputs) * RESIDUE_BYTES[self.bits]


Products = Callable[[Site, "Mask"], tuple[Tensor, ...]]
"""The products (T, O) of a mask with a site's weights. Called by the pool's thread; what takes long
leaves off when the mask has been given up, see `Mask.check_wanted`."""


class Mask:
    """One mask, with the products that are subtracted from the answer. Any thread."""

    def __init__(self, name: MaskName, site: Site, recording: bool = False) -> None:
        """``recording``: for training, as far as is known when it is begun."""
        self.name = name
        self.site = site
        self.recording = recording
        self._lock = threading.Lock()
        self._numbers: Tensor | None = None
        self._done = threading.Event()
        self._products: tuple[Tensor, ...] | BaseException = ()

    @property
    def numbers(self) -> Tensor:
        """The mask itself, (T, I)."""
        with self._lock:
            if self._numbers is None:
                site = self.site
                self._numbers = expand(self.name, site.rows, site.width, site.bits)
            return self._numbers

    @property
    def is_complete(self) -> bool:
        return self._done.is_set()

    def complete(self, compute: Products) -> None:
        """Compute the products; a failure is kept for who waits for them."""
        try:
            found: tuple[Tensor, ...] | BaseException = compute(self.site, self)
        except BaseException as error:  # noqa: BLE001 - raised where the products are asked for
            found = error
        if not self._done.is_set():  # given up meanwhile
            self._products = found
            self._done.set()

    @property
    def has_failed(self) -> bool:
        return self.is_complete and isinstance(self._products, BaseException)

    def give_up(self, why: BaseException) -> None:
        """Nobody will complete it."""
        self._products = why
        self._done.set()

    def check_wanted(self) -> None:
        """Raises ConnectionLost if it was given up: there is no need to compute on."""
        if self._done.is_set():
            raise _closed()

    def products(self) -> tuple[Tensor, ...]:
        """Wait for the products; raises what their computation raised."""
        self._done.wait()
        if isinstance(self._products, BaseException):
            raise self._products
        return self._products


class MaskPool:
    """Fresh masks for one session. Not thread-safe, as a session's lock guards it; after a fork
    the child has an empty pool, and names of its own."""

    def __init__(self, compute: Products, ahead_bytes: int) -> None:
        """At most ``ahead_bytes`` of masks wait to be used."""
        self._compute = compute
        self._ahead_bytes = ahead_bytes
        self._stream = MaskStream()
        self._used = self._prepared = self._dropped = 0
        self._start()

    def take(self, site: Site, recording: bool = False) -> Mask:
        """A mask that nobody has had and nobody will have again. ``recording``: for training, and
        so will be the next one for this site."""
        if self._generation != generation():
            self._start()
        mask = self._waiting.pop(site, None)
        if mask is not None:
            self._bytes -= site.num_bytes
            if mask.has_failed:  # a helper was away: it may be back
                self._dropped += 1
                mask = None
        self._prepared += mask is not None and mask.is_complete
        mask = mask or Mask(self._stream.next(), site, recording)
        self._used += 1
        if not mask.is_complete:
            self._worker.now(mask)
        self._prepare(site, recording)
        return mask

    @property
    def use(self) -> MaskUse:
        return MaskUse(self._used, self._prepared, self._dropped)

    def stop(self) -> None:
        """No more masks are prepared, and nobody waits for one. From any thread; idempotent."""
        self._stop()

    def close(self) -> None:
        """`stop`, and wait until that is so; idempotent."""
        self._dropped += len(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        self._stop()
        self._worker.join()

    def _start(self) -> None:
        self._generation = generation()
        self._waiting: OrderedDict[Site, Mask] = OrderedDict()  # the one taken longest ago first
        self._taken: OrderedDict[Site, int] = OrderedDict()  # when last, counted in masks; likewise
        self._bytes = 0
        self._worker = _Worker(self._compute)
        self._stop = weakref.finalize(self, self._worker.stop)

    def _prepare(self, site: Site, recording: bool) -> None:
        """Begin the next mask for a site, if there is room or others have been passed over."""
        before = self._taken.pop(site, None)
        self._taken[site] = self._used
        if len(self._taken) > _MOST_SITES:
            self._taken.popitem(last=False)
        if site.num_bytes > self._ahead_bytes:
            return
        self._make_room(site.num_bytes, 0 if before is None else self._used - before)
        if self._bytes + site.num_bytes <= self._ahead_bytes:
            self._waiting[site] = mask = Mask(self._stream.next(), site, recording)
            self._bytes += site.num_bytes
            self._worker.later(mask)

    def _make_room(self, num_bytes: int, round_: int) -> None:
        """Drop what nobody has come for in two rounds, if ``round_`` masks after its last use a
        site is back. What is used in turn stays: dropping the one for the other would help none."""
        while round_ and self._bytes + num_bytes > self._ahead_bytes and self._waiting:
            site, mask = next(iter(self._waiting.items()))
            if self._used - self._taken.get(site, 0) <= 2 * round_:
                return
            del self._waiting[site]
            self._worker.forget(mask)
            self._bytes -= site.num_bytes
            self._dropped += 1


class _Worker:
    """Completes masks in a thread, which is started with the first. Does not know its pool, so
    that a forgotten pool ends it."""

    def __init__(self, compute: Products) -> None:
        self._compute = compute
        self._generation = generation()
        self._todo: deque[Mask] = deque()
        self._running: Mask | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def now(self, mask: Mask) -> None:
        """Somebody waits for it."""
        with self._changed:
            if self._stopped:
                mask.give_up(_closed())
                return
            if mask in self._todo:
                self._todo.remove(mask)
            elif mask is self._running or mask.is_complete:
                return
            self._todo.appendleft(mask)
            self._wake()

    def later(self, mask: Mask) -> None:
        with self._changed:
            self._todo.append(mask)
            self._wake()

    def forget(self, mask: Mask) -> None:
        with self._changed:
            if mask in self._todo:
                self._todo.remove(mask)

    def stop(self) -> None:
        """Begin no more and leave off; whoever waits is told so."""
        if self._generation != generation():  # a child: the thread, and perhaps its lock, is not
            return
        with self._changed:
            self._stopped = True
            if self._running is not None:
                self._running.give_up(_closed())
            while self._todo:
                self._todo.popleft().give_up(_closed())
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has left off, but not for a helper that is stuck."""
        if self._thread is not None and self._generation == generation():
            self._thread.join(_PATIENCE_S)

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="symbiosis-masks", daemon=True)
            self._thread.start()
            _at_work.add(self)
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._todo and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                mask = self._running = self._todo.popleft()
            mask.complete(self._compute)
            del mask


_at_work: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _leave_off() -> None:
    """A thread within torch when the interpreter ends would abort the process."""
    for worker in list(_at_work):
        worker.stop()
        worker.join()


def _closed() -> ConnectionLost:
    return ConnectionLost("the session was closed")
