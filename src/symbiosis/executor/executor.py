"""`Executor`: the hosted model as one object, in process or behind sockets.

Puts weights, scheduler, engine and server together and answers what clients ask outside the
data path. This is the executor's public face.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from symbiosis.errors import (
    ConnectionFailed,
    ConnectionLost,
    FetchRefused,
    ProtocolError,
    RequestRefused,
    SymbiosisError,
)
from symbiosis.executor.admin import Administration
from symbiosis.executor.bounds import Bounds
from symbiosis.executor.digests import ModelDigest
from symbiosis.executor.engine import Engine
from symbiosis.executor.guard import Guard, admin_address, check_reach, refusal
from symbiosis.executor.keystore import FetchPolicy, Tenant
from symbiosis.executor.quantized import Scheme
from symbiosis.executor.ring import describe, not_offered, offer, only_ring
from symbiosis.executor.scheduler import Policy, Scheduler, Terms
from symbiosis.executor.server import Server
from symbiosis.executor.streams import on_default
from symbiosis.executor.weights import Weights
from symbiosis.kernels import TORCH, KernelChoice
from symbiosis.privacy.modes import Bits
from symbiosis.transport import device_memory
from symbiosis.transport.addresses import Address
from symbiosis.transport.device_arena import DeviceBlocks, blocks_of
from symbiosis.transport.inproc import InprocChannel
from symbiosis.transport.lent import Lender
from symbiosis.transport.tls import ServerTls
from symbiosis.waiting import end_team
from symbiosis.wire.exchange import Exchange, Result
from symbiosis.wire.frames import VERSION, Json, Limits
from symbiosis.wire.tensors import as_bytes, empty_payload

logger = logging.getLogger(__name__)


class Executor:
    """One frozen base model, hosted once.

    ``Executor.load(path)`` then ``listen([...])`` for clients in other processes; or give the
    object itself to ``symbiosis.connect`` for clients in this one. Close it, or use it as a
    context manager. Every method may be called from any thread.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        policy: Policy = "align",
        training_share: float = 0.2,
        fetch: FetchPolicy = "allow",
        max_payload_bytes: int = 1 << 30,
        masked: Sequence[Bits] = (),
        keys: Path | None = None,
        bounds: Bounds = Bounds(),
        kernels: KernelChoice = "exact",
    ) -> None:
        """``fetch`` says whether clients may read whole weights (DoRA, merging, ...). ``masked``
        offers masked exchanges, with weights of 8 or 16 bits, which are kept beside the others.
        ``keys`` is a key store: with it, every client of another process has to show that it
        belongs to a tenant. ``bounds`` are for what listens. ``kernels``: with
        "exact" a lone client gets the bits of the plain model, with "fastest" what takes the least
        time here. Raises KeyStoreError, SymbiosisError where tenants could change the weights of
        all."""
        self.weights = weights
        if keys is not None and weights.lender is not None and not weights.lender.is_sealed:
            raise _not_lent_to_tenants()
        weights.choose_kernels(kernels)
        offer(weights, tuple(masked))
        end_team()  # of loading and measuring, which is over
        self._masked_clients: set[int] = set()
        self._bounds = bounds
        self.digest = ModelDigest(weights)
        self._fetch = fetch
        self._limits = Limits(payload_bytes=max_payload_bytes)
        self._engine = Engine(
            weights,
            Scheduler(policy, training_share=training_share),
            max_result_bytes=max_payload_bytes,
        )
        self._guard = None if keys is None else Guard(keys, clock=self._engine.clock)
        self._draining = False
        self._instance = secrets.token_hex(8)
        self._server: Server | None = None
        # Set when the server has ended. Not Thread.join: interrupted by an exception from a
        # signal handler, it takes the thread for ended and the next join returns at once.
        self._ended = threading.Event()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype | Literal["fastest"] | None = None,
        device: str = "cpu",
        quantize: Scheme | None = None,
        policy: Policy = "align",
        training_share: float = 0.2,
        fetch: FetchPolicy = "allow",
        masked: Sequence[Bits] = (),
        lend: bool = False,
        keys: Path | None = None,
        bounds: Bounds = Bounds(),
        kernels: KernelChoice = "exact",
    ) -> Executor:
        """Load a local ``transformers`` folder or a hub id; raises ModelError.

        ``dtype`` is by default that of the files; "fastest" computes in float32 instead where a
        measurement says that this is faster. ``quantize`` keeps the matrices of the linear layers
        in eight bits (``int8``) or four (``nf4``); embeddings, the output head, convolutions and
        experts stay dense. ``masked`` offers masked exchanges to clients; see `Executor`.
        ``lend`` keeps the weights in memory that clients on this host may map, to compute with by
        themselves: read-only on the CPU; on a GPU, for clients on the same one, that they could
        write to. Those that may not fetch weights are lent none. ``kernels``: see `Executor`.
        """
        if lend and keys is not None and torch.device(device).type != "cpu":
            raise _not_lent_to_tenants()  # before minutes are spent on loading
        weights = Weights.load(model, dtype=dtype, device=device, quantize=quantize, lend=lend)
        return cls(
            weights,
            policy=policy,
            training_share=training_share,
            fetch=fetch,
            masked=masked,
            keys=keys,
            bounds=bounds,
            kernels=kernels,
        )

    @classmethod
    def of(cls, model: PreTrainedModel, *, name: str = "in-memory model") -> Executor:
        """Host a model that is already in memory; it must not be changed afterwards."""
        return cls(Weights(model, name))

    def listen(
        self,
        urls: Sequence[str],
        inherited: Sequence[tuple[socket.socket, Address]] = (),
        *,
        tls: ServerTls | None = None,
        allow_remote: bool = False,
        admin: str | None = None,
    ) -> list[str]:
        """Serve ``urls`` from a thread of this process; the URLs with the ports really taken.

        ``inherited`` are listening sockets of a parent process, used in place of ``urls`` and left
        to it. ``tls`` is the certificate for tls:// addresses. ``allow_remote`` takes away the
        check that what other machines can reach is encrypted and asks who they are. ``admin`` is
        a unix:// address for the operator, see `Administration`. Raises ConnectionFailed if an
        address cannot be listened on.
        """
        if self._server is not None:
            raise SymbiosisError("this executor listens already")
        addresses = [Address.parse(url) for url in urls]
        addresses = [address for _, address in inherited] or addresses
        authenticated = tls is not None and tls.client_ca is not None
        check_reach(addresses, self._guard is not None or authenticated, allow_remote)
        if self._guard is None and authenticated:
            self._guard = Guard(None, clock=self._engine.clock)
        server = Server(
            self,
            self._engine,
            addresses,
            self._limits,
            inherited,
            tls=tls,
            guard=self._guard,
            blocks=self._blocks(),
            bounds=self._bounds,
            admin=None if admin is None else (admin_address(admin), Administration(self)),
        )
        self._server = server
        self.digest.start()
        self._ended.clear()
        threading.Thread(target=self._run, name="symbiosis-executor", daemon=True).start()
        return [str(address) for address in server.addresses]

    def _blocks(self) -> DeviceBlocks | None:
        """Of the GPU's memory, for clients of this host to exchange through; none among tenants,
        for whoever had one before could read it."""
        device = self.weights.device
        exchanged = device.type in device_memory.EXCHANGED and self._guard is None
        return blocks_of(device) if exchanged else None

    def wait(self) -> None:
        """Block until the server stops."""
        if self._server is not None:
            self._ended.wait()

    def _run(self) -> None:
        assert self._server is not None
        try:
            self._server.run()
        finally:
            self._ended.set()

    def close(self) -> None:
        """Answer what is queued, tell the clients, stop listening; idempotent."""
        if self._server is not None:
            self._server.stop()
            self._ended.wait()
            self._server = None
        self.digest.stop()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open_channel(self, hello: Json) -> InprocChannel:
        """A channel for a client in this process; `symbiosis.connect` calls it."""
        return InprocChannel(self, hello)

    # What a client asks outside the data path; the server and `InprocChannel` call these.

    def attach(
        self, hello: Json, transport: str = "inproc", certificate: tuple[str, ...] = ()
    ) -> tuple[int, Json]:
        """Take a client on; ``certificate`` has the names in the one that it showed, if any.

        Raises ProtocolError if its HELLO is not one, AuthenticationFailed, QuotaExceeded.
        """
        if hello.get("protocol") != VERSION:
            raise ProtocolError(
                f"the client speaks protocol {ascii(hello.get('protocol'))[:32]}, this executor "
                f"{VERSION}: use the same release on both sides"
            )
        pid = hello.get("pid")
        name = _printable(hello.get("client") or "client", 64)
        terms = _terms(hello)
        holder = None
        if self._guard is not None and transport != "inproc":
            holder = self._guard.identify(hello.get("key"), certificate)
        if self._draining and transport != "inproc":
            raise ConnectionFailed(
                "this executor takes no new sessions, because it is about to end: try another, or "
                "later"
            )
        masked = hello.get("masked")
        if masked is not None and masked not in list(self.weights.ring):  # it may be any JSON
            raise ProtocolError(not_offered(self.weights, masked))
        account = None
        if holder is not None:
            account = holder.account
            account.open_session()
        client = self._engine.add_client(
            name, transport, pid if isinstance(pid, int) else None, terms, account
        )
        if self._guard is not None and holder is not None:
            self._guard.enter(client, holder)
        if masked is not None:
            self._masked_clients.add(client)
        return client, self._welcome(client)

    def lend(self, client: int, pid: int | None) -> Lender | None:
        """The memory that the weights lie in; None if this client is lent nothing. ``pid`` is its
        process, as the system says, if it does."""
        lender = self.weights.lender
        if lender is None or self._fetch_policy(client) == "deny":
            return None
        stats = self._engine.stats.clients[client]
        stats.lent, stats.pid = True, pid
        return lender

    def detach(self, client: int) -> None:
        if self._guard is not None:
            self._guard.leave(client)
        self._masked_clients.discard(client)
        self._engine.remove_client(client)

    def compute(self, client: int, exchange: Exchange) -> Result | SymbiosisError:
        """Run one exchange with the caller's thread; see `InprocChannel`."""
        answer: list[Result | SymbiosisError] = []
        try:
            if client in self._masked_clients:
                only_ring((exchange,))
            plan = self._engine.admit(exchange)
        except SymbiosisError as error:
            self._engine.refused(client)
            return error

        def computed() -> Result | SymbiosisError:
            self._engine.submit(client, exchange, plan, answer.append)
            with torch.no_grad():
                while not answer:
                    if not self._engine.run_once() and not answer:
                        time.sleep(min(self._engine.wait_s() or 0.0, 0.001))
            return answer[0]

        return on_default(self.weights.device, computed, _tensors)

    def answer(self, client: int, question: Json) -> tuple[Json, torch.Tensor]:
        """The answer to a REQUEST. Raises RequestRefused, FetchRefused, UnknownWeight,
        ProtocolError."""
        asked = question.get("get")
        if not isinstance(asked, str):
            raise ProtocolError(f"unknown request {ascii(asked)[:64]}: not text")
        tenant = self._tenant_of(client)
        free = asked in ("weight", "digest")  # the one has a policy of its own, all need the other
        if tenant is not None and not free and asked not in tenant.requests:
            raise RequestRefused(
                f"tenant {tenant.name} may not ask for {asked[:64]!r} here; what it may is "
                f"for the operator to say, in the key store"
            )
        match asked:
            case "stats":
                return self._stats(tenant), empty_payload(0)
            case "files":
                files = self.weights.files
                sizes: Json = {"files": {name: len(data) for name, data in files.items()}}
                return sizes, _payload(b"".join(files.values()))
            case "parameters":
                return {}, _payload(self.weights.shipped_bytes())
            case "digest":
                return self.digest.answer(), empty_payload(0)
            case "weight":
                return self._whole_weight(
                    client, question.get("id"), _printable(question.get("why"), 200)
                )
            case "ring":
                facts, scales = describe(self.weights, question.get("bits"))
                return facts, _payload(scales)
        raise ProtocolError(f"unknown request {asked[:64]!r}")

    # What the operator asks; see `Administration`. Called in the server's thread.

    def status(self) -> Json:
        """Everything that is counted, of all tenants."""
        return {**self.describe(), **self._engine.snapshot(), "draining": self._draining}

    def tenants(self) -> Json:
        """Use and limits of every tenant."""
        return {} if self._guard is None else self._guard.accounts()

    def reload(self) -> int:
        """Read the key store anew; how many sessions that has ended. Raises KeyStoreError."""
        if self._guard is None or self._server is None:
            raise SymbiosisError("this executor has no key store: serve it with --keys")
        self._guard.reload()
        ended = self._guard.outdated()
        for client in ended:
            self._server.disconnect(client, refusal())
        return len(ended)

    def drain(self) -> int:
        """Take no new sessions; how many there still are."""
        self._draining = True
        return len(self._engine.stats.clients)

    def disconnect(self, client: int) -> None:
        """End one session; it may come back. Raises SymbiosisError if there is none."""
        gone = ConnectionLost("the operator has ended this session")
        server = self._server if client > 0 else None  # below 0: operators, not clients
        if server is None or not server.disconnect(client, gone):
            raise SymbiosisError(
                f"there is no client {client}; `symbiosis admin status` lists them"
            )

    def _tenant_of(self, client: int) -> Tenant | None:
        return None if self._guard is None else self._guard.tenant_of(client)

    def _stats(self, tenant: Tenant | None) -> Json:
        """A tenant sees its own clients and its own use, and nothing that others move."""
        if tenant is None or self._guard is None:
            return {**self.describe(), **self._engine.snapshot()}
        return {
            **self.describe(),
            "policy": self._engine.policy,
            "clients": self._engine.clients_of(tenant.name),
            "tenant": {"name": tenant.name, **self._guard.account_of(tenant)},
        }

    def describe(self) -> Json:
        """The hosted model in a few facts."""
        weights = self.weights
        return {
            "model": weights.name,
            "architecture": weights.architecture,
            "dtype": str(weights.dtype).removeprefix("torch."),
            "device": str(weights.device),
            "parameters": weights.num_parameters,
            "bytes": weights.num_bytes,
            "quantization": weights.quantization,
            "kernels": "exact" if weights.for_one is TORCH else "fastest",
            "pid": os.getpid(),
        }

    def _whole_weight(self, client: int, number: object, why: str) -> tuple[Json, torch.Tensor]:
        hosted = self.weights[number if isinstance(number, int) else -1]
        name = hosted.names[0]
        if self._fetch_policy(client) == "deny":
            raise FetchRefused(
                f"{why} needs the whole of {name}, and this executor does not hand out "
                f"weights; choose a method that does not read them, or ask the operator to serve "
                f"with --fetch allow"
            )
        stats = self._engine.stats.clients.get(client)
        if stats is not None:
            stats.fetches += 1
        logger.info("client %d fetches %s for %s", client, name, why)
        data = hosted.dense().cpu().contiguous()
        return {"dtype": str(data.dtype).removeprefix("torch.")}, data.reshape(-1).view(torch.uint8)

    def _fetch_policy(self, client: int) -> FetchPolicy:
        tenant = self._tenant_of(client)
        return self._fetch if tenant is None or tenant.fetch is None else tenant.fetch

    def _welcome(self, client: int) -> Json:
        weights = self.weights
        return {
            **self.describe(),
            "protocol": VERSION,
            "session": client,
            "weights": [
                {"id": w.id, "names": list(w.names), "shape": list(w.tensor.shape), "axis": w.axis}
                for w in weights
            ],
            "vectors": weights.vector_ids,
            "digest": self.digest.ready,
            "fetch": self._fetch_policy(client),
            "max_payload_bytes": self._limits.payload_bytes,
            "masked": list(weights.ring),
            "instance": self._instance,
            "onednn": weights.for_one.to_json(),
        }


def _not_lent_to_tenants() -> SymbiosisError:
    return SymbiosisError(
        "memory of a GPU can be written to by whoever borrows it, so it is not lent to tenants: "
        "leave out --lend, or --keys where all clients are your own"
    )


def _tensors(answer: Result | SymbiosisError) -> tuple[torch.Tensor, ...]:
    return answer.tensors if isinstance(answer, Result) else ()


def _printable(text: object, most: int) -> str:
    """What a client says, as it may go into logs and onto an operator's terminal."""
    return "".join(mark if mark.isprintable() else "?" for mark in str(text)[:most])


def _terms(hello: Json) -> Terms:
    """What a client asks for itself; raises ProtocolError."""
    weight, deadline_ms = hello.get("weight", 1.0), hello.get("deadline_ms")
    if not isinstance(weight, (int, float)) or not 0.1 <= weight <= 10:
        raise ProtocolError(f"a client's weight is {weight!r}; it must be from 0.1 to 10")
    if deadline_ms is None:
        return Terms(weight)
    if not isinstance(deadline_ms, (int, float)) or not deadline_ms >= 0:
        raise ProtocolError(f"a client's deadline_ms is {deadline_ms!r}; it must be 0 or more")
    return Terms(weight, deadline_ms / 1e3)


def _payload(data: bytes) -> torch.Tensor:
    payload = empty_payload(len(data))
    as_bytes(payload)[:] = data
    return payload
