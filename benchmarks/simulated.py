"""The executor's real scheduler under simulated clients, in virtual time: deterministic.

Costs: a batch takes max(weight bytes / bandwidth, its operations / speed) plus a fixed time per
exchange in it (reading, checking, answering); a client thinks between two exchanges (its own
layers) and before a token (sampling), log-normally. Clients have processors of their own: what a
busy machine adds when they all think at once is not modelled.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from dataclasses import dataclass, field
from random import Random

from symbiosis.executor.scheduler import Batch, Policy, Request, Scheduler
from symbiosis.wire.exchange import Priority


@dataclass(frozen=True)
class Machine:
    """What things cost, in seconds; by default the 110M Llama of `harness` on two CPU cores."""

    bytes_per_s: float = 15e9
    flops_per_s: float = 60e9
    exchange_s: float = 0.15e-3
    think_s: float = 0.5e-3
    sample_s: float = 1e-3
    noise: float = 0.3  # sigma of the logarithm of a think time


@dataclass(frozen=True)
class Shape:
    """A model as a sequence of exchanges for one token: (key, parameters)."""

    steps: tuple[tuple[str, int], ...]


def llama(layers: int = 12, hidden: int = 768, ffn: int = 2048, vocabulary: int = 32000) -> Shape:
    """Four exchanges per layer: q/k/v, o, gate/up, down."""
    layer = (
        ("qkv", 3 * hidden * hidden),
        ("o", hidden * hidden),
        ("up", 2 * hidden * ffn),
        ("down", hidden * ffn),
    )
    body = tuple((f"{i}.{name}", size) for i in range(layers) for name, size in layer)
    return Shape((("embed", 0), *body, ("head", hidden * vocabulary)))


@dataclass
class Client:
    """A decoder or a trainer, and what it went through."""

    number: int
    steps: tuple[tuple[str, int], ...]
    rows: int = 1
    priority: Priority = Priority.INTERACTIVE
    pause_s: float = 0.0  # before every token; a reader's speed
    think: float = 1.0  # × the machine's
    arrives_s: float = 0.0
    tokens: int | None = None  # it leaves after so many
    at: int = 0
    token_ends_s: list[float] = field(default_factory=list)
    counted_from: int = 0  # exchanges answered before the measurement began

    @property
    def answered(self) -> int:
        return len(self.token_ends_s) * len(self.steps) + self.at

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.token_ends_s)]


def decoder(number: int, shape: Shape, **fields: float) -> Client:
    return Client(number, shape.steps, **fields)  # type: ignore[arg-type]


def trainer(number: int, shape: Shape, rows: int = 512) -> Client:
    """One "token" is a whole step: forward, then backward through the same weights."""
    backward = tuple((f"{key}ᵀ", size) for key, size in reversed(shape.steps[1:]))
    return Client(number, shape.steps + backward, rows, Priority.TRAINING)


class Simulation:
    """Runs clients against a scheduler until a time."""

    def __init__(self, scheduler: Scheduler, clients: list[Client], machine: Machine, seed: int):
        self.scheduler, self.machine = scheduler, machine
        self.clients = {client.number: client for client in clients}
        self.now_s = self.busy_s = 0.0
        self.batches: list[int] = []  # sizes, of interactive batches
        self._random = Random(seed)
        self._ids = itertools.count(1)
        self._events: list[tuple[float, int]] = [(c.arrives_s, c.number) for c in clients]
        heapq.heapify(self._events)

    def run(self, until_s: float) -> None:
        while self.now_s < until_s:
            self._arrivals()
            batch = self.scheduler.next_batch(self.now_s)
            if batch is not None:
                self._compute(batch)
                continue
            wake_s = self.scheduler.wake_at(self.now_s)
            next_s = self._events[0][0] if self._events else math.inf
            self.now_s = min(next_s, math.inf if wake_s is None else wake_s)

    def _arrivals(self) -> None:
        while self._events and self._events[0][0] <= self.now_s:
            _, number = heapq.heappop(self._events)
            client = self.clients[number]
            key, _ = client.steps[client.at]
            self.scheduler.submit(
                Request(
                    next(self._ids),
                    number,
                    key,
                    client.rows,
                    client.priority,
                    self.now_s,
                    opens=client.at == 0,
                    divisible=client.at > 0,
                )
            )

    def _compute(self, batch: Batch) -> None:
        first = self.clients[batch.requests[0].client]
        _, size = first.steps[first.at]
        m = self.machine
        product_s = max(4 * size / m.bytes_per_s, 2 * size * batch.rows / m.flops_per_s)
        elapsed_s = product_s + m.exchange_s * len(batch.requests)
        self.now_s += elapsed_s
        self.busy_s += elapsed_s
        if batch.completes:
            if batch.priority is Priority.INTERACTIVE:
                self.batches.append(len(batch.requests))
            for request in batch.requests:
                self._answer(self.clients[request.client])
        self.scheduler.finished(batch, self.now_s, elapsed_s)

    def _answer(self, client: Client) -> None:
        client.at += 1
        think_s = self.machine.think_s * client.think
        rest_s = 0.0
        if client.at == len(client.steps):
            client.at = 0
            client.token_ends_s.append(self.now_s)
            rest_s = client.pause_s
            think_s = self.machine.sample_s
            if client.tokens is not None and len(client.token_ends_s) >= client.tokens:
                self.scheduler.remove_client(client.number)
                return
        think_s *= client.rows**0.5 * math.exp(self._random.gauss(0, self.machine.noise))
        heapq.heappush(self._events, (self.now_s + think_s + rest_s, client.number))


@dataclass(frozen=True)
class Outcome:
    """What one policy made of one load, after the first tenth of the time."""

    tokens_per_s: float
    mean_batch: float
    p50_ms: float
    p99_ms: float
    steps_per_s: float  # of all trainers
    busy: float


def simulate(
    policy: Policy, clients: list[Client], seconds: float, machine: Machine, seed: int = 0
) -> Outcome:
    simulation = Simulation(Scheduler(policy), clients, machine, seed)
    simulation.run(seconds / 10)
    for client in clients:
        client.counted_from = client.answered
    simulation.run(seconds)
    return outcome(simulation, seconds)


def outcome(simulation: Simulation, seconds: float) -> Outcome:
    from_s = seconds / 10

    clients = simulation.clients.values()
    decoders = [c for c in clients if c.priority is Priority.INTERACTIVE]
    decoded = [[at_s for at_s in c.token_ends_s if at_s >= from_s] for c in decoders]
    trainers = [c for c in clients if c.priority is Priority.TRAINING]
    steps = sum((c.answered - c.counted_from) / len(c.steps) for c in trainers)
    gaps = sorted(b - a for times in decoded for a, b in itertools.pairwise(times))
    sizes = simulation.batches
    return Outcome(
        tokens_per_s=sum(map(len, decoded)) / (seconds - from_s),
        mean_batch=statistics.fmean(sizes) if sizes else 0.0,
        p50_ms=1e3 * gaps[len(gaps) // 2] if gaps else 0.0,
        p99_ms=1e3 * gaps[len(gaps) * 99 // 100] if gaps else 0.0,
        steps_per_s=steps / (seconds - from_s),
        busy=simulation.busy_s / simulation.now_s,
    )
