"""Chains that are computed product by product while others decode: who joins, and what is right."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from exchanges import exchange, weight_id
from symbiosis.errors import ConnectionLost, ExchangeFailed, SymbiosisError
from symbiosis.executor.engine import Engine
from symbiosis.executor.scheduler import Policy, Scheduler
from symbiosis.executor.weights import Weights
from symbiosis.wire.chain import Chain, Instruction, Step, pack_chain
from symbiosis.wire.exchange import Exchange, Op, Priority, Result

Outcome = Result | SymbiosisError


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(tiny.llama_with_biases(), "tiny")


@pytest.fixture
def engine(weights: Weights) -> Engine:
    return Engine(weights, Scheduler("align"))


class Client:
    """Asks an engine, and keeps the answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.id = engine.add_client("client", "inproc")
        self.answers: list[Outcome] = []

    def ask(self, asked: Exchange) -> None:
        self.engine.submit(self.id, asked, self.engine.admit(asked), self.answers.append)

    def leave(self) -> None:
        self.engine.remove_client(self.id)


class Mlp:
    """An MLP's products on a residual stream, as decoders of different methods ask for them."""

    def __init__(self, weights: Weights) -> None:
        layer = "layers.0"
        names = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        self.ids = tuple(weight_id(weights, f"{layer}.{name}.weight") for name in names)
        self.norm = weights.vector_ids[f"model.{layer}.post_attention_layernorm.weight"]
        self.biases = tuple(
            weights.vector_ids.get(f"model.{layer}.{name}.bias", 0) for name in names
        )
        self.weights = weights

    def linear(self, index: int, x: Tensor) -> Tensor:
        bias = self.biases[index]
        vector = self.weights.vector(bias) if bias else None
        return F.linear(x, self.weights[self.ids[index]].tensor, vector)

    def whole(self, heads: Tensor, stream: Tensor) -> Exchange:
        """o, gate, up, down."""
        steps = [
            Instruction(Step.LINEAR, 0, 0),  # 2: o
            Instruction(Step.ADD, 1, 2),  # 3: the residual stream
            Instruction(Step.VECTOR, self.norm),
            Instruction(Step.RMS_NORM, 3, 4, number=1e-6),  # 5
            Instruction(Step.LINEAR, 5, 1),  # 6: gate
            Instruction(Step.LINEAR, 5, 2),  # 7: up
            Instruction(Step.SILU, 6),
            Instruction(Step.MULTIPLY, 8, 7),  # 9
            Instruction(Step.LINEAR, 9, 3),  # 10: down
            Instruction(Step.ADD, 3, 10),  # 11
        ]
        return self._chain(steps, (2, 6, 7, 11), (0, 1, 2, 3), heads, stream)

    def short(self, heads: Tensor, stream: Tensor) -> Exchange:
        """o, gate, up; the adapter comes before down."""
        return self._chain(
            [
                Instruction(Step.LINEAR, 0, 0),
                Instruction(Step.ADD, 1, 2),
                Instruction(Step.VECTOR, self.norm),
                Instruction(Step.RMS_NORM, 3, 4, number=1e-6),
                Instruction(Step.LINEAR, 5, 1),
                Instruction(Step.LINEAR, 5, 2),
            ],
            (6, 7),
            (0, 1, 2),
            heads,
            stream,
        )

    def plain(self, x: Tensor, *indices: int) -> Exchange:
        """Products of one input, asked for without a chain."""
        ids, biases = zip(*((self.ids[i], self.biases[i]) for i in indices), strict=True)
        return exchange(Op.LINEAR, ids, x, biases=biases, priority=Priority.INTERACTIVE)

    def whole_result(self, heads: Tensor, stream: Tensor) -> Tensor:
        o = self.linear(0, heads)
        stream = stream + o
        x = F.rms_norm(stream, (32,), self.weights.vector(self.norm), 1e-6)
        gate, up = self.linear(1, x), self.linear(2, x)
        return torch.cat([o, gate, up, stream + self.linear(3, F.silu(gate) * up)], 1)

    def short_result(self, heads: Tensor, stream: Tensor) -> Tensor:
        return self.whole_result(heads, stream)[:, 32 : 32 + 2 * 64]

    def _chain(
        self,
        steps: list[Instruction],
        outputs: tuple[int, ...],
        indices: tuple[int, ...],
        *tensors: Tensor,
    ) -> Exchange:
        return exchange(
            Op.CHAIN,
            tuple(self.ids[i] for i in indices),
            *tensors,
            biases=tuple(self.biases[i] for i in indices),
            params=pack_chain(Chain(tuple(steps), outputs)),
            priority=Priority.INTERACTIVE,
        )


@pytest.fixture(scope="module")
def mlp(weights: Weights) -> Mlp:
    return Mlp(weights)


def drain(engine: Engine) -> int:
    count = 0
    while engine.run_once():
        count += 1
    return count


def another_decodes(engine: Engine, mlp: Mlp) -> Client:
    """A client that waits, with a product that nobody else begins with."""
    other = Client(engine)
    other.ask(mlp.plain(torch.randn(1, 64), 3))
    return other


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 32, generator=generator), torch.randn(count, 32, generator=generator)


def tensor_of(client: Client) -> Tensor:
    (answer,) = client.answers
    assert isinstance(answer, Result), answer
    (found,) = answer.tensors
    return found


def batch_of(client: Client) -> int:
    (answer,) = client.answers
    assert isinstance(answer, Result), answer
    return answer.batch_size


def sizes(engine: Engine) -> dict[str, int]:
    found = engine.snapshot()["batch_sizes"]
    assert isinstance(found, dict)
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_client_alone_has_its_chain_computed_at_once(engine: Engine, mlp: Mlp) -> None:
    client = Client(engine)
    client.ask(mlp.whole(*rows(1)))
    assert drain(engine) == 1
    assert close(tensor_of(client), mlp.whole_result(*rows(1)))


@pytest.mark.parametrize("policy", ["greedy", "none"])
def test_policies_that_know_no_rhythms_compute_chains_at_once(
    weights: Weights, mlp: Mlp, policy: Policy
) -> None:
    engine = Engine(weights, Scheduler(policy))
    clients = [Client(engine) for _ in range(2)]
    clients[0].ask(mlp.whole(*rows(1)))
    clients[1].ask(mlp.short(*rows(1)))
    assert drain(engine) == 2
    assert sizes(engine) == {"1": 2}


def test_a_chain_walked_alone_has_the_same_bits(engine: Engine, mlp: Mlp) -> None:
    at_once, walking = Client(engine), Client(engine)
    at_once.ask(mlp.whole(*rows(3)))
    drain(engine)
    another_decodes(engine, mlp)
    walking.ask(mlp.whole(*rows(3)))
    assert drain(engine) == 1 + 3  # o; gate and up; down
    assert torch.equal(tensor_of(walking), tensor_of(at_once))
    assert batch_of(walking) == 1


def test_chains_of_two_methods_share_the_products_that_both_need(engine: Engine, mlp: Mlp) -> None:
    whole, short = Client(engine), Client(engine)
    another_decodes(engine, mlp)
    whole.ask(mlp.whole(*rows(2, 1)))
    short.ask(mlp.short(*rows(3, 2)))
    assert drain(engine) == 1 + 3
    assert close(tensor_of(whole), mlp.whole_result(*rows(2, 1)))
    assert close(tensor_of(short), mlp.short_result(*rows(3, 2)))
    assert sizes(engine) == {"1": 1 + 1, "2": 2}
    assert (batch_of(whole), batch_of(short)) == (2, 2)  # 5/3, rounded; 2


def test_plain_products_and_chains_share_a_batch(engine: Engine, mlp: Mlp) -> None:
    """As of a client with LoRA on every layer, which asks for gate and up when o is there."""
    walking, plain = Client(engine), Client(engine)
    x = rows(2, 3)[0]
    plain.ask(mlp.plain(x, 0))
    walking.ask(mlp.whole(*rows(1, 1)))
    assert engine.run_once()
    assert close(tensor_of(plain), mlp.linear(0, x))
    plain.answers.clear()
    plain.ask(mlp.plain(x, 1, 2))
    assert drain(engine) == 2
    (answer,) = plain.answers
    assert isinstance(answer, Result)
    assert answer.batch_size == 2
    assert close(answer.tensors[0], mlp.linear(1, x))
    assert close(answer.tensors[1], mlp.linear(2, x))
    assert close(tensor_of(walking), mlp.whole_result(*rows(1, 1)))


def test_many_with_one_chain_walk_together(engine: Engine, mlp: Mlp) -> None:
    another_decodes(engine, mlp)
    clients = [Client(engine) for _ in range(4)]
    for seed, client in enumerate(clients):
        client.ask(mlp.whole(*rows(seed + 1, seed)))
    assert drain(engine) == 1 + 3
    assert sizes(engine) == {"1": 1, "4": 3}
    for seed, client in enumerate(clients):
        assert close(tensor_of(client), mlp.whole_result(*rows(seed + 1, seed)))


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_who_leaves_on_the_way_does_not_disturb_the_others(
    engine: Engine, mlp: Mlp, leaves: int
) -> None:
    another_decodes(engine, mlp)
    clients = [Client(engine) for _ in range(3)]
    for seed, client in enumerate(clients):
        client.ask(mlp.whole(*rows(seed + 1, seed)))
    assert engine.run_once()
    assert engine.run_once()
    assert sizes(engine) == {"1": 1, "3": 1}
    clients[leaves].leave()
    late = Client(engine)  # a new one, in the memory of the old one perhaps
    late.ask(mlp.short(*rows(2, 7)))
    drain(engine)
    for seed, client in enumerate(clients):
        if seed == leaves:
            assert [type(answer) for answer in client.answers] == [ConnectionLost]
        else:
            assert close(tensor_of(client), mlp.whole_result(*rows(seed + 1, seed)))
    assert close(tensor_of(late), mlp.short_result(*rows(2, 7)))


def test_who_leaves_while_its_product_is_computed_is_told_once(engine: Engine, mlp: Mlp) -> None:
    """The other client's answer comes in the middle of the batch: then the walking one leaves."""
    walking, other = Client(engine), Client(engine)
    asked = mlp.plain(rows(1)[0], 0)
    engine.submit(other.id, asked, engine.admit(asked), lambda _: walking.leave())
    walking.ask(mlp.whole(*rows(1)))
    drain(engine)
    assert [type(answer) for answer in walking.answers] == [ConnectionLost]
    assert not engine.waiting


def test_answers_of_one_client_keep_their_order(engine: Engine, mlp: Mlp) -> None:
    another_decodes(engine, mlp)
    client = Client(engine)
    client.ask(mlp.whole(*rows(1, 1)))
    client.ask(mlp.plain(rows(1, 2)[0], 0))
    client.ask(mlp.short(*rows(1, 3)))
    drain(engine)
    first, second, third = (a.tensors[0] for a in client.answers if isinstance(a, Result))
    assert close(first, mlp.whole_result(*rows(1, 1)))
    assert close(second, mlp.linear(0, rows(1, 2)[0]))
    assert close(third, mlp.short_result(*rows(1, 3)))


def test_a_failure_on_the_way_stays_with_its_cause(engine: Engine, mlp: Mlp) -> None:
    """One chain lies about its residual stream, so that it fails after the first product."""
    clients = [Client(engine) for _ in range(3)]
    asked = [mlp.whole(*rows(1, seed)) for seed in range(3)]
    asked[1] = asked[1]._replace(tensors=(rows(1, 1)[0], torch.randn(1, 7)))
    another_decodes(engine, mlp)
    for client, one in zip(clients, asked, strict=True):
        client.ask(one)
    drain(engine)
    assert [type(answer) for answer in clients[1].answers] == [ExchangeFailed]
    for seed in (0, 2):
        assert close(tensor_of(clients[seed]), mlp.whole_result(*rows(1, seed)))


def test_ids_and_shipped_vectors_are_split_with_their_rows(
    engine: Engine, weights: Weights, mlp: Mlp
) -> None:
    """A chain from a lookup on; one of those who walk together leaves, so that they part."""
    table = weight_id(weights, "embed_tokens.weight")
    steps = (
        Instruction(Step.EMBEDDING, 0, 0),
        Instruction(Step.VECTOR, mlp.norm),
        Instruction(Step.RMS_NORM, 1, 2, number=1e-6),
        Instruction(Step.LINEAR, 3, 1),
        Instruction(Step.RMS_NORM, 4, 2, number=1e-6),
        Instruction(Step.LINEAR, 5, 1),
    )
    params = pack_chain(Chain(steps, (4, 6)))

    def asked(*ids: int) -> Exchange:
        return exchange(
            Op.CHAIN,
            (table, mlp.ids[0]),
            torch.tensor(ids),
            params=params,
            priority=Priority.INTERACTIVE,
        )

    another_decodes(engine, mlp)
    clients = [Client(engine) for _ in range(3)]
    for number, client in enumerate(clients):
        client.ask(asked(*range(number + 1)))
    while sizes(engine).get("3", 0) < 2:
        assert engine.run_once()
    clients[1].leave()
    drain(engine)
    w, o = weights[table].tensor, weights[mlp.ids[0]].tensor
    for number in (0, 2):
        norm = weights.vector(mlp.norm)
        first = F.linear(F.rms_norm(w[: number + 1], (32,), norm, 1e-6), o)
        second = F.linear(F.rms_norm(first, (32,), norm, 1e-6), o)
        assert close(tensor_of(clients[number]), torch.cat([first, second], 1))


def test_nothing_is_kept_of_a_chain_that_has_been_answered(engine: Engine, mlp: Mlp) -> None:
    gc.disable()  # freed at once, not when a collector comes by
    try:
        another_decodes(engine, mlp)
        client = Client(engine)
        heads, stream = rows(1)
        gone = weakref.ref(stream.untyped_storage())
        client.ask(mlp.whole(heads, stream))
        del heads, stream
        assert gone() is not None
        assert drain(engine) == 1 + 3
        assert gone() is None
    finally:
        gc.enable()


def test_time_and_batches_are_counted_over_the_whole_way(engine: Engine, mlp: Mlp) -> None:
    other, client = Client(engine), Client(engine)
    other.ask(mlp.plain(rows(1)[0], 0))
    client.ask(mlp.whole(*rows(2)))
    drain(engine)
    stats = engine.stats.clients[client.id]
    assert (stats.exchanges, stats.rows) == (1, 2)
    assert stats.mean_batch == pytest.approx(4 / 3)
    assert engine.stats.operations == {Op.LINEAR: 1, Op.CHAIN: 1}
    (answer,) = client.answers
    assert isinstance(answer, Result)
    assert answer.compute_us == pytest.approx(1e6 * engine.stats.compute_s, abs=3)


def test_waiting_is_counted_at_every_stop(weights: Weights, mlp: Mlp) -> None:
    """Batches run at 1, 2, 3 and 4 s and take no time; the first is another's."""
    now_s = 0.0
    engine = Engine(weights, Scheduler("align"), clock=lambda: now_s)
    another_decodes(engine, mlp)
    client = Client(engine)
    client.ask(mlp.whole(*rows(1)))
    for _ in range(4):
        now_s += 1.0
        assert engine.run_once()
    (answer,) = client.answers
    assert isinstance(answer, Result)
    assert answer.queue_us == 4_000_000
    assert engine.stats.clients[client.id].queue_s == 4.0


def test_who_all_ask_for_one_chain_need_no_stops(engine: Engine, mlp: Mlp) -> None:
    """At first nobody knows; then it is computed at once, until somebody asks otherwise."""
    clients = [Client(engine) for _ in range(3)]

    def ask(*numbers: int) -> int:
        """The batches that these need, in order; the last client asks for the shorter chain."""
        for number in numbers:
            make = mlp.short if number == 2 else mlp.whole
            clients[number].answers.clear()
            clients[number].ask(make(*rows(1, number)))
        count = drain(engine)
        for number in numbers:
            expected = mlp.short_result if number == 2 else mlp.whole_result
            assert close(tensor_of(clients[number]), expected(*rows(1, number)))
        return count

    assert ask(0, 1) > 1
    assert ask(1, 0) == 1
    assert ask(0, 1) == 1
    assert ask(2, 0, 1) > 1
