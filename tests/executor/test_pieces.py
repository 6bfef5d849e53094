"""A large training exchange beside a decoder: in pieces, answered once, with the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tiny
from exchanges import exchange, weight_id
from symbiosis.errors import ConnectionLost, ExchangeFailed, SymbiosisError
from symbiosis.executor import ring
from symbiosis.executor.batch import Pieces
from symbiosis.executor.engine import Engine
from symbiosis.executor.scheduler import Scheduler
from symbiosis.executor.weights import Weights
from symbiosis.wire.exchange import Exchange, Op, Priority, Result
from symbiosis.wire.views import View

Outcome = Result | SymbiosisError
ROWS = 200  # 4 pieces of 50, since nothing is known yet about how long a row takes


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """An engine with a decoder that has answered regularly, and a trainer."""

    def __init__(self) -> None:
        self.weights = Weights(tiny.llama_with_biases(), "tiny")
        self.clock = Clock()
        self.engine = Engine(self.weights, Scheduler("align"), clock=self.clock)
        self.decoder = self.engine.add_client("decoder", "inproc")
        self.trainer = self.engine.add_client("trainer", "inproc")
        for _ in range(4):
            self.clock.now_s += 1.0
            self.decode()
            assert self.engine.run_once()
        self.clock.now_s += 0.2  # it will be back in 0.8 s

    def submit(self, client: int, asked: Exchange) -> list[Outcome]:
        answers: list[Outcome] = []
        self.engine.submit(client, asked, self.engine.admit(asked), answers.append)
        return answers

    def decode(self) -> list[Outcome]:
        number = weight_id(self.weights, "0.mlp.up_proj.weight")
        return self.submit(
            self.decoder,
            exchange(Op.LINEAR, number, torch.randn(1, 32), priority=Priority.INTERACTIVE),
        )

    def training(self, *shape: int) -> Exchange:
        numbers = ("0.mlp.up_proj.weight", "0.mlp.gate_proj.weight")
        ids = tuple(weight_id(self.weights, name) for name in numbers)
        return exchange(Op.LINEAR, ids, torch.randn(*shape))

    def drain(self) -> int:
        count = 0
        while self.engine.run_once():
            count += 1
        return count


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_mask_comes_in_pieces_too(scene: Scene) -> None:
    """The largest masks are those of prompts and training, and a helper has decoders as well."""
    ring.offer(scene.weights, (8, 16))
    number = weight_id(scene.weights, "0.mlp.up_proj.weight")
    key = torch.arange(32, dtype=torch.uint8)
    for bits in (8, 16):
        asked = exchange(Op.RING_MASK, number, key, params=(int(Op.RING_LINEAR), bits, ROWS, 5))
        answers = scene.submit(scene.trainer, asked)
        assert scene.drain() == 4
        (answer,) = answers
        assert isinstance(answer, Result)
        (wanted,) = ring.run(asked, scene.weights, asked.tensors)
        assert torch.equal(answer.tensors[0], wanted)


@pytest.mark.parametrize("shape", [(ROWS, 32), (2, ROWS // 2, 32)])
def test_pieces_give_the_bits_of_the_whole(scene: Scene, shape: tuple[int, ...]) -> None:
    asked = scene.training(*shape)
    answers = scene.submit(scene.trainer, asked)
    assert scene.drain() == 4
    (answer,) = answers
    assert isinstance(answer, Result)
    for found, weight in zip(answer.tensors, asked.weights, strict=True):
        expected = F.linear(asked.tensors[0], scene.weights[weight].tensor)
        assert found.shape == expected.shape
        assert torch.equal(found, expected)
    mine = scene.engine.snapshot()["clients"][str(scene.trainer)]  # type: ignore[index]
    assert (mine["exchanges"], mine["rows"]) == (1, ROWS)
    assert not scene.engine.waiting


def test_a_decoder_waits_for_one_piece(scene: Scene) -> None:
    trained = scene.submit(scene.trainer, scene.training(ROWS, 32))
    assert scene.engine.run_once()
    decoded = scene.decode()
    assert scene.engine.run_once()
    assert isinstance(decoded[0], Result)
    assert not trained
    scene.clock.now_s += 0.1
    assert scene.drain() == 3
    assert isinstance(trained[0], Result)


def test_alone_a_trainer_is_computed_whole(scene: Scene) -> None:
    scene.engine.remove_client(scene.decoder)
    trained = scene.submit(scene.trainer, scene.training(ROWS, 32))
    assert scene.drain() == 1
    assert isinstance(trained[0], Result)


def test_the_rest_is_computed_at_once_when_the_decoder_leaves(scene: Scene) -> None:
    trained = scene.submit(scene.trainer, scene.training(ROWS, 32))
    assert scene.engine.run_once()
    scene.engine.remove_client(scene.decoder)
    assert scene.drain() == 1
    assert isinstance(trained[0], Result)


def test_a_trainer_that_leaves_amid_its_pieces(scene: Scene) -> None:
    trained = scene.submit(scene.trainer, scene.training(ROWS, 32))
    assert scene.engine.run_once()
    scene.engine.remove_client(scene.trainer)
    assert isinstance(trained[0], ConnectionLost)
    assert scene.drain() == 0
    assert not scene.engine.waiting
    assert not scene.engine._pieces


def test_a_piece_that_fails_ends_the_exchange_and_nothing_else(scene: Scene) -> None:
    asked = scene.training(ROWS, 32)
    lie = asked._replace(tensors=(torch.randn(ROWS, 7),))
    failed, next_one = scene.submit(scene.trainer, lie), scene.submit(scene.trainer, asked)
    scene.drain()
    assert [type(answer) for answer in failed] == [ExchangeFailed]
    assert [type(answer) for answer in next_one] == [Result]
    assert not scene.engine.waiting
    assert not scene.engine._pieces


def test_a_weight_without_columns_in_pieces(scene: Scene) -> None:
    number = weight_id(scene.weights, "0.mlp.up_proj.weight")
    asked = exchange(Op.LINEAR, number, torch.zeros(ROWS, 0), recipe=(View.SLICE, 4, 1, 0, 0, 1))
    answers = scene.submit(scene.trainer, asked)
    assert scene.drain() == 4
    (answer,) = answers
    assert isinstance(answer, Result)
    assert torch.equal(answer.tensors[0], torch.zeros(ROWS, 64))


def test_no_memory_for_the_whole_result(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: Pieces, start: int, outputs: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Pieces, "add", add)
    answers = scene.submit(scene.trainer, scene.training(ROWS, 32))
    decoded = scene.decode()
    scene.drain()
    assert [type(answer) for answer in answers] == [ExchangeFailed]
    assert [type(answer) for answer in decoded] == [Result]
    assert not scene.engine.waiting


def test_a_trainer_that_leaves_while_its_piece_fails(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread, which is how it is answered only once."""

    def compute(members: object, waits: bool) -> list[SymbiosisError]:
        scene.engine.remove_client(scene.trainer)
        return [ExchangeFailed("it failed")]

    answers = scene.submit(scene.trainer, scene.training(ROWS, 32))
    monkeypatch.setattr(scene.engine, "_compute", compute)
    assert scene.engine.run_once()
    assert [type(answer) for answer in answers] == [ConnectionLost]
    assert not scene.engine.waiting


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("error", [KeyError("a mistake"), KeyboardInterrupt()])
def test_everybody_is_answered_whatever_happens(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: BaseException, pieces: bool
) -> None:
    """A mistake of ours ends what is in the batch; an interrupted thread of this process too, and
    goes on being interrupted."""
    clients = [scene.trainer] if pieces else [scene.decoder, scene.trainer]
    if not pieces:
        scene.engine._scheduler.policy = "greedy"
    with monkeypatch.context() as patch:
        patch.setattr(scene.engine, "_compute", lambda members, waits: (_ for _ in ()).throw(error))
        answers = [
            scene.submit(client, scene.training(ROWS, 32) if pieces else scene.training(2, 32))
            for client in clients
        ]
        if isinstance(error, Exception):
            assert scene.engine.run_once()
        else:
            with pytest.raises(KeyboardInterrupt):
                scene.engine.run_once()
    for each in answers:
        assert [type(answer) for answer in each] == [ExchangeFailed]
    assert not scene.engine.waiting
    assert not scene.engine._pieces
    again = scene.submit(scene.trainer, scene.training(ROWS, 32))
    scene.drain()
    assert [type(answer) for answer in again] == [Result]
