"""A session: one client's connection to an executor, and what it learned there.

Sends exchanges for the remote weights, one at a time and from any thread (autograd calls from
threads of its own), groups products that share an input, fetches whole weights when that is
asked for and allowed, and builds models. Knows channels; knows no sockets.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from symbiosis.client.ahead import Ahead
from symbiosis.client.borrowed import Borrowed
from symbiosis.client.cores import Cores
from symbiosis.client.counters import Counters, SessionStats
from symbiosis.client.recovery import T, recover
from symbiosis.client.trace import plain
from symbiosis.client.verifying import Trust, Verifier
from symbiosis.client.welcome import (
    Identity,
    WeightInfo,
    kernels_for_one,
    recognise,
    unpack_files,
    vector_table,
    weight_table,
)
from symbiosis.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    ProtocolError,
    QuotaExceeded,
    SymbiosisError,
)
from symbiosis.privacy.modes import Privacy, PrivacyReport, report_of
from symbiosis.transport.channel import Channel
from symbiosis.wire.exchange import NO_BIAS, Exchange, Op, Priority
from symbiosis.wire.frames import VERSION, Json
from symbiosis.wire.tensors import spec_of
from symbiosis.wire.views import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PriorityName = Literal["auto", "interactive", "training"]
Opener = Callable[[Json], Channel]

_serial = itertools.count(1)


class Session:
    """A client's connection to one executor; `symbiosis.connect` opens it.

    Safe to use from several threads: exchanges take turns. After a fork the child opens a
    connection of its own at the first exchange. A session holds no computation state in the
    executor, so closing it loses nothing, and what was under way when the connection was lost is
    sent again, as it was, to whoever answers at the same address with the same weights.
    """

    def __init__(
        self,
        opener: Opener,
        url: str,
        *,
        name: str | None = None,
        priority: PriorityName = "auto",
        weight: float = 1.0,
        deadline_ms: float | None = None,
        retry_s: float = 0.0,
        trust: Trust = Trust(),
        masked: int | None = None,
    ) -> None:
        """``opener`` opens channels to ``url``; the first is opened here, at once or not at all.
        Later ones are tried for up to ``retry_s``. ``masked`` declares that nothing but masked
        exchanges will come, with weights of so many bits. For the rest see `symbiosis.connect`.
        Raises ConnectionFailed, ProtocolError, ModelError."""
        if priority not in ("auto", "interactive", "training"):
            raise ValueError(f"priority is {priority!r}; use auto, interactive or training")
        self.url = url
        self._terms = weight, deadline_ms
        self._retry_s = retry_s
        self._opener = opener
        self._priority = priority
        self._hello: Json = {
            "protocol": VERSION,
            "client": name or f"client-{os.getpid()}-{next(_serial)}",
            "weight": weight,
            "deadline_ms": deadline_ms,
        }
        if masked is not None:
            self._hello["masked"] = masked
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._channel_pid = 0
        self._closing = threading.Event()
        self._counters = Counters()
        self._cores: Cores | None = None
        self._ahead = Ahead(
            functools.partial(_vector_id, weakref.ref(self)), in_process=url == "inproc"
        )
        self._fetched: dict[int, Tensor] = {}
        self._folder: Path | None = None
        self._remove_folder: weakref.finalize[[Path, int], Session] | None = None
        self.weights: dict[int, WeightInfo] = {}
        self._trust = trust
        self._identity: Identity | None = None
        self._verifier: Verifier | None = None
        self.welcome: Json = {}
        self.borrowed: Borrowed | None = None
        _sessions.add(self)
        first = self._open()
        self.welcome = first.welcome
        try:
            self.weights = weight_table(self.welcome)
            self.vectors = vector_table(self.welcome)
            if first.lent is not None:
                kernels = kernels_for_one(self.welcome)
                self.borrowed = Borrowed(first.lent, self.weights, self._known(), kernels)
            if trust.verify:
                self._verifier = Verifier(self, trust)
                self._ahead.verify = self._verifier.chain
        except SymbiosisError:
            self._drop_channel()
            raise

    @property
    def digest(self) -> str:
        """What the executor says that it hosts; ``symbiosis digest FOLDER`` prints the same."""
        return self._known().digest

    # Models

    def model(
        self,
        auto_class: type | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> PreTrainedModel:
        """The hosted model as an ordinary transformers model; its frozen weights stay remote.

        ``auto_class`` is a transformers model or Auto class if another head is wanted than the
        one hosted (its new parameters are local and trainable); ``dtype`` is that of the
        activations, by default the executor's. Raises ModelError, ConnectionLost.
        """
        from symbiosis.client.load import build_model  # the model builder needs the session

        where = torch.empty(0, device=device or "cpu").device  # with its number
        return build_model(self, auto_class, where, dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the executor ships with the model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_folder(), trust_remote_code=False)

    def model_folder(self) -> Path:
        """A local folder with the configuration and tokenizer files, without weights; it is
        removed when the session is closed."""
        with self._lock:
            if self._folder is None:
                answer, payload = self._request({"get": "files"})
                files = unpack_files(answer, payload.numpy().tobytes())
                folder = Path(tempfile.mkdtemp(prefix="symbiosis-"))
                self._remove_folder = weakref.finalize(self, _remove, folder, os.getpid())
                for name, data in files.items():
                    self._known().check_file(name, data)
                    (folder / name).write_bytes(data)
                self._folder = folder
            return self._folder

    def shipped(self) -> dict[str, Tensor]:
        """Small parameters and buffers that live with the client, by name; fresh copies."""
        _, payload = self._request({"get": "parameters"})
        found = load_safetensors(payload.numpy().tobytes())
        for name, value in found.items():
            self._known().check_parameter(name, value)
        if self._verifier is not None:
            self._verifier.shipped(found)
        return found

    # Statistics

    def stats(self) -> SessionStats:
        """What this session has cost so far."""
        checked = self._verifier
        return self._counters.stats(
            grouped=self._ahead.grouped,
            verified=checked.verified if checked else 0,
            unverified=checked.unverified if checked else 0,
        )

    def privacy_report(self) -> PrivacyReport:
        """What this session hides from whoever runs the executor, and what it does not."""
        return report_of(Privacy(), self.stats())

    def executor_stats(self) -> dict[str, Any]:
        """The executor's own counters: clients, exchanges/s, batch sizes, memory, queue times."""
        answer, _ = self._request({"get": "stats"})
        return dict(answer)

    # The data path

    def product(
        self,
        op: Op,
        x: Tensor,
        weight: int,
        recipe: Recipe,
        bias: int,
        *,
        forward: bool,
        recording: bool = False,
    ) -> Tensor:
        """LINEAR or MATMUL of ``x`` (..., I) with a weight: (..., O), in x's dtype, on its device.

        ``forward`` marks a product whose siblings on the same input may be asked for with it;
        ``recording`` that gradients are recorded or computed, so that this is training (within an
        autograd function and in a backward pass torch says no).
        """
        with self._lock:
            if forward and not recipe and not x.is_inference():  # those have no version
                member = (op, weight, recipe, bias)
                return self._ahead.product(member, x, recording, self._send_forward)
            x = x.detach().contiguous()
            return self._exchange(
                op, (weight,), (bias,), recipe, (), (plain(x),), forward, recording
            )[0]

    def lookup(self, ids: Tensor, weight: int, recipe: Recipe) -> Tensor:
        """EMBEDDING of ``ids`` (...) with a weight: (..., O)."""
        recording = torch.is_grad_enabled()
        with self._lock:
            if not recipe and not ids.is_inference():
                member = (Op.EMBEDDING, weight, recipe, NO_BIAS)
                return self._ahead.product(member, ids, recording, self._send_forward)
            ids = ids.detach().contiguous()
            return self._exchange(
                Op.EMBEDDING, (weight,), (NO_BIAS,), recipe, (), (ids,), True, recording
            )[0]

    def exchange(
        self,
        op: Op,
        weight: int,
        recipe: Recipe,
        tensors: tuple[Tensor, ...],
        *,
        params: tuple[int, ...] = (),
        bias: int = NO_BIAS,
    ) -> Tensor:
        """Any operation of the closed list on one weight; the result on the input's device."""
        detached = tuple(tensor.detach().contiguous() for tensor in tensors)
        backward = is_backward()
        recording = backward or torch.is_grad_enabled()
        with self._lock:
            return self._exchange(
                op, (weight,), (bias,), recipe, params, detached, not backward, recording
            )[0]

    def fetch(self, weight: int, why: str) -> Tensor:
        """The whole of a weight, on the CPU, in the executor's dtype; kept for further use.

        The caller must not change it. Raises FetchRefused if the executor does not allow it.
        """
        with self._lock:
            found = self._fetched.get(weight)
            if found is None and self.borrowed is not None:
                found = self.borrowed.weight(weight, torch.device("cpu"))
            if found is None:
                answer, payload = self._request({"get": "weight", "id": weight, "why": why})
                info = self.weights[weight]
                dtype = getattr(torch, str(answer["dtype"]))
                found = payload.view(dtype).view(info.shape)
                self._known().check_weight(info.names[0], found)
                self._fetched[weight] = found
                self._counters.fetched_bytes += len(payload)
                logger.warning(
                    "fetched the whole of %s (%.1f MB) because %s reads it; it is kept in memory",
                    info.names[0],
                    len(payload) / 1e6,
                    why,
                )
            return found

    def plan(self) -> list[list[str]]:
        """The chains that have been learned: the weights that one exchange asks for, in order.
        Empty until a few tokens have been decoded; see `symbiosis.client.chains`."""
        with self._lock:
            return [
                [self.weights[weight].names[0] for _, weight, _, _ in chain]
                for chain in self._ahead.plan()
            ]

    def share_cores(self) -> None:
        """The executor wants the same cores: from now on threads wait as suits both."""
        if self.borrowed is None:
            self._cores = Cores()

    def close(self) -> None:
        """Leave the executor; idempotent."""
        self._closing.set()  # who waits for a lost executor waits no longer
        with self._lock:
            self._drop_channel()
            self._ahead.clear()
            if self._remove_folder is not None:
                self._remove_folder()
            self._folder = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        """A worker process gets a session of its own to the same executor."""
        if self.url == "inproc":
            raise SymbiosisError(
                "a session within the executor's own process cannot go to another process: let "
                "the executor listen on a unix:// or tcp:// address and connect to that"
            )
        reopen = functools.partial(
            Session,
            name=str(self._hello["client"]),
            priority=self._priority,
            weight=self._terms[0],
            deadline_ms=self._terms[1],
            retry_s=self._retry_s,
            trust=self._trust._replace(expect_digest=self.digest),
        )
        return reopen, (self._opener, self.url)

    def __repr__(self) -> str:
        state = "closed" if self._closing.is_set() else f"{self._counters.exchanges} exchanges"
        return f"<Session {self.url}: {self.welcome.get('model')}, {state}>"

    def _send_forward(
        self,
        op: Op,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        params: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        recording: bool,
    ) -> tuple[Tensor, ...]:
        return self._exchange(op, weights, biases, (), params, tensors, True, recording)

    def _exchange(
        self,
        op: Op,
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        recipe: Recipe,
        params: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        forward: bool,
        recording: bool,
    ) -> tuple[Tensor, ...]:
        specs = tuple(spec_of(tensor) for tensor in tensors)
        exchange = Exchange(
            op, weights, biases, recipe, params, specs, tensors, self._priority_of(recording)
        )
        if tensors[0].is_cuda and self.url != "inproc":  # its own kernels are no part of the wait
            torch.cuda.current_stream(tensors[0].device).synchronize()
        started_s = time.perf_counter()
        try:
            result = self._open().exchange(exchange)
        except BaseException as error:  # noqa: BLE001 (raised again)
            result = self._recover(error, lambda channel: channel.exchange(exchange))
        now_s = time.perf_counter()
        self._counters.answered(exchange, result, now_s - started_s, forward)
        if self._cores is not None:
            self._cores.look(self._counters, now_s, result.shared)
        if len(result.tensors) != (1 if op is Op.CHAIN else len(weights)):
            raise ProtocolError(f"{len(result.tensors)} results for {len(weights)} weights")
        if self._verifier is not None and op is not Op.CHAIN:
            self._verifier.exchange(op, weights, biases, recipe, tensors[0], result.tensors)
        device = tensors[0].device
        if result.tensors[0].device == device:
            return result.tensors
        return tuple(tensor.to(device) for tensor in result.tensors)

    def _priority_of(self, recording: bool) -> Priority:
        if self._priority == "auto":
            return Priority.TRAINING if recording else Priority.INTERACTIVE
        return Priority.TRAINING if self._priority == "training" else Priority.INTERACTIVE

    def _request(self, question: Json) -> tuple[Json, Tensor]:
        with self._lock:
            try:
                return self._open().request(question)
            except BaseException as error:  # noqa: BLE001 (raised again)
                return self._recover(error, lambda channel: channel.request(question))

    def _recover(self, error: BaseException, ask: Callable[[Channel], T]) -> T:
        """The answer to ``ask`` from a new connection, if the old one was lost; else raises
        ``error``."""

        def again() -> T:
            try:
                return ask(self._reopen())
            except BaseException as failed:
                self._after(failed)
                raise

        self._after(error)
        patience_s = 0.0 if self._closing.is_set() else self._retry_s
        return recover(error, again, self.url, patience_s, self._closing.wait)

    def _after(self, error: BaseException) -> None:
        """After a refusal the channel is in order. After anything else (it is lost, out of step,
        or we were interrupted while an answer was under way) the next use opens a new one."""
        refused = isinstance(error, SymbiosisError)
        ended = (ConnectionLost, ProtocolError, AuthenticationFailed)  # the last: a revoked key
        if not refused or isinstance(error, ended):
            self._drop_channel()

    def _open(self) -> Channel:
        if self._closing.is_set():
            raise ConnectionLost(f"this session with {self.url} is closed; call connect() again")
        if self._channel is None or self._channel_pid != os.getpid():
            channel = self._opener({**self._hello, "pid": os.getpid()})
            try:
                self._identity = recognise(
                    channel, self.url, self._trust.expect_digest, self._identity, self.welcome
                )
                if self.borrowed is not None:
                    self.borrowed.follow(channel.lent)
            except BaseException:
                channel.close()
                raise
            self._channel, self._channel_pid = channel, os.getpid()
        return self._channel

    def _reopen(self) -> Channel:
        """As `_open`, after a connection was lost: a full house may be so by our own lost one."""
        try:
            return self._open()
        except QuotaExceeded as error:
            raise ConnectionFailed(str(error)) from error

    def _after_fork(self) -> None:
        """In the child: whatever thread was in an exchange is not here to leave it."""
        self._lock = threading.RLock()
        self._ahead.clear()

    def _known(self) -> Identity:
        assert self._identity is not None
        return self._identity

    def _drop_channel(self) -> None:
        if self._channel is not None and self._channel_pid == os.getpid():
            self._channel.close()
        self._channel = None


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _renew_after_fork() -> None:
    for session in list(_sessions):
        session._after_fork()


os.register_at_fork(after_in_child=_renew_after_fork)


def is_backward() -> bool:
    """Are gradients being computed? (The recomputation of a checkpoint records: it is none.)"""
    computing: bool = torch._C._current_graph_task_id() != -1
    return computing and not torch.is_grad_enabled()


def _remove(folder: Path, owner_pid: int) -> None:
    """A forked child must not remove its parent's folder."""
    if os.getpid() == owner_pid:
        shutil.rmtree(folder, ignore_errors=True)


def _vector_id(session: weakref.ref[Session], tensor: Tensor) -> int:
    """The executor's number of the shipped vector that ``tensor`` was made from, or 0. Its values
    may have been changed since. The reference is weak: a forgotten session closes at once."""
    number, owner, _ = getattr(tensor, "symbiosis_vector", (0, None, None))
    return number if owner is not None and owner is session() else 0
