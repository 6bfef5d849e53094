"""What one client of a soak does, in a process of its own; and what it found.

Good clients compare every answer with the plain model in their own process: batches are shared
with others, so to a tolerance; alone, to the bit. Bad ones do what a healthy executor shrugs off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

import raw
from raw import RawClient
from symbiosis import Session, connect
from symbiosis.errors import ConnectionFailed
from symbiosis.wire.exchange import NO_BIAS, Op

TOLERANCE = 1e-4
"""For logits and losses near 1 to 10: batches of other sizes may take another kernel."""

METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@dataclasses.dataclass
class Finding:
    """What a client has to say at its end."""

    role: str
    error: str = ""
    deviation: float = 0.0
    """Largest difference from the plain model."""
    exchanges: int = 0
    latencies_s: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Task:
    """Which role, against whom, and with which seed."""

    role: str
    url: str
    model: Path
    seed: int
    arena_bytes: int


def main(task: Task, found: Connection) -> None:
    """The process: play the role, tell what was found."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    finding = Finding(task.role)
    try:
        ROLES[task.role](task, finding)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is a violation)
        finding.error = f"{type(error).__name__}: {error}"
    found.send(finding)
    found.close()


def _session(task: Task) -> Session:
    """An executor that is being started again may hang up on who connects just then."""
    for tries in range(20):
        try:
            return connect(task.url, name=f"soak {task.role}", arena_bytes=task.arena_bytes)
        except ConnectionFailed:
            if tries == 19:
                raise
            time.sleep(0.2)
    raise AssertionError


def _local(task: Task) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()


def _compare(finding: Finding, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    difference = float((ours - theirs).abs().max())
    finding.deviation = max(finding.deviation, difference)
    if not difference <= tolerance:  # NaN too
        raise AssertionError(f"an answer is wrong by {difference:g}, more than {tolerance:g}")


def lone(task: Task, finding: Finding) -> None:
    """With nobody else there: to the bit."""
    _decode(task, finding, tolerance=0.0, tokens=12)


def decoder(task: Task, finding: Finding) -> None:
    _decode(task, finding, TOLERANCE, tokens=40)


def _decode(task: Task, finding: Finding, tolerance: float, tokens: int) -> None:
    """Token by token with a cache, the plain model beside it fed the very same tokens."""
    chance = torch.Generator().manual_seed(task.seed)
    with _session(task) as session, torch.no_grad():
        models = session.model(), _local(task)
        ids = torch.randint(3, 300, (1, 1 + task.seed % 9), generator=chance)
        caches = [None, None]
        for _ in range(tokens):
            answers = [
                model(ids, past_key_values=cache, use_cache=True)
                for model, cache in zip(models, caches, strict=True)
            ]
            caches = [answer.past_key_values for answer in answers]
            _compare(finding, answers[0].logits, answers[1].logits, tolerance)
            ids = answers[1].logits[:, -1:].argmax(-1)
        finding.exchanges = session.stats().exchanges


def trainer(task: Task, finding: Finding) -> None:
    """A few steps of one PEFT method: the losses are those of plain peft."""
    method = sorted(METHODS)[task.seed % len(METHODS)]
    chance = torch.Generator().manual_seed(task.seed)
    batches = [torch.randint(3, 300, (4, 24 + 40 * (task.seed % 2)), generator=chance)] * 6
    with _session(task) as session:
        ours, theirs = (
            _losses(model, method, batches, task.seed) for model in (session.model(), _local(task))
        )
        _compare(finding, torch.tensor(ours), torch.tensor(theirs), 10 * TOLERANCE)
        finding.exchanges = session.stats().exchanges


def _losses(
    model: PreTrainedModel, method: str, batches: list[torch.Tensor], seed: int
) -> list[float]:
    set_seed(seed)
    adapted = peft.get_peft_model(model, METHODS[method]()).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for ids in batches:
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def prober(task: Task, finding: Finding) -> None:
    """Small and large products, timed and compared; every answer is held for a while."""
    weight = 2  # the first product of the first layer, (64, 64)
    chance = random.Random(task.seed)
    with _session(task) as session:
        whole = session.fetch(weight, "a soak")
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(60):
            x = torch.randn(chance.choice((1, 7, 300, 2000)), 64)
            began_s = time.monotonic()
            y = session.product(Op.LINEAR, x, weight, (), NO_BIAS, forward=True)
            finding.latencies_s.append(time.monotonic() - began_s)
            kept = [*kept[-4:], (y, torch.nn.functional.linear(x, whole))]
            for ours, theirs in kept:
                _compare(finding, ours, theirs, TOLERANCE)
            time.sleep(chance.uniform(0, 0.01))
        finding.exchanges = session.stats().exchanges


def garbage(task: Task, finding: Finding) -> None:
    """Random bytes, before and after a greeting, and frames that promise what they do not hold."""
    chance = random.Random(task.seed)
    for _ in range(20):
        with RawClient(task.url, greet=chance.random() < 0.7) as client:
            noise = chance.randbytes(chance.randrange(1, 3000))
            meta = raw.exchange_meta(raw.LINEAR, (chance.randrange(1, 40),), (3, 64))
            size = chance.randrange(1, 1 << 20)
            client.send(
                chance.choice(
                    (
                        noise,
                        raw.header(raw.EXCHANGE, 1, len(meta), size) + meta + noise,
                        raw.frame(raw.EXCHANGE, 2, noise, noise),
                        raw.json_frame(raw.REQUEST, 3, {"get": noise.hex()}),
                    )
                )
            )


def slow_reader(task: Task, finding: Finding) -> None:
    """Asks for much and takes nothing, then a little, then leaves."""
    with RawClient(task.url) as client:
        client.socket.settimeout(1.0)
        # The executor does not read on before its answers are taken.
        with contextlib.suppress(TimeoutError):
            client.send(raw.json_frame(raw.REQUEST, 1, {"get": "files"}) * 300)
        time.sleep(1.0)
        client.socket.recv(100)


def flood(task: Task, finding: Finding) -> None:
    """As many exchanges as the socket takes, without reading an answer."""
    meta = raw.exchange_meta(raw.LINEAR, (2,), (64, 64))
    frame = raw.frame(raw.EXCHANGE, 1, meta, bytes(4 * 64 * 64))
    with RawClient(task.url) as client:
        client.socket.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            client.send(frame * 2000)


def _hung_up_on(play: Callable[[Task, Finding], None]) -> Callable[[Task, Finding], None]:
    """Who misbehaves may be hung up on, also by an executor that dies."""

    def role(task: Task, finding: Finding) -> None:
        with contextlib.suppress(OSError, AssertionError):
            play(task, finding)

    return role


GOOD = {"decoder": decoder, "trainer": trainer, "prober": prober}
BAD = {
    "garbage": _hung_up_on(garbage),
    "slow reader": _hung_up_on(slow_reader),
    "flood": _hung_up_on(flood),
}
ROLES = {"lone": lone, **GOOD, **BAD}
