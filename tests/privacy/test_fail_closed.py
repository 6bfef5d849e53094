"""What a privacy mode cannot do is refused by name, before a byte of it is sent; and an executor
that is sent something else on a masked session ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from recorder import Recorder
from safetensors.torch import load, save, save_file
from transformers import PreTrainedModel

import raw
import tiny
from exchanges import exchange, weight_id
from raw import RawClient
from symbiosis import Executor, Privacy, Session, connect
from symbiosis.errors import ConnectionLost, InvalidInput, ModelError, PrivacyError, ProtocolError
from symbiosis.executor import ring
from symbiosis.wire.exchange import NO_BIAS, RING_OPS, Exchange, Op, Priority
from symbiosis.wire.frames import Kind

IDS = tiny.tokens()
Serve = Callable[..., tuple[Executor, str]]
MODES = ["masked-local", "masked-split", "noise"]


@pytest.fixture
def recorded(serve: Serve, tmp_path: Path) -> Iterator[object]:
    """``recorded(model, mode)``: a session in that mode, and a recorder of what it sends."""
    opened: list[Recorder | Session] = []

    def open_session(model: PreTrainedModel, mode: str) -> tuple[Session, Recorder]:
        _, url = serve(model, masked=(8,))
        _, helper = serve(model, masked=(8,))
        recorder = Recorder(tmp_path, url)
        split = mode == "masked-split"
        privacy = Privacy(mode=mode, helper=helper if split else None)  # type: ignore[arg-type]
        session = connect(recorder.url, arena_bytes=0, privacy=privacy, retry_s=0)
        opened.extend([session, recorder])
        return session, recorder

    yield open_session
    for each in opened:
        each.close()


def check_nothing_open(recorder: Recorder, mode: str) -> None:
    """No token id in any mode; no float and nothing but ring operations in a masked one."""
    for asked in recorder.asked:
        assert asked.op is not Op.EMBEDDING
        if mode != "noise":
            assert asked.op in RING_OPS
            assert all(t.dtype in (torch.int32, torch.int16) for t in asked.tensors)


@pytest.mark.parametrize("mode", MODES)
def test_experts_are_refused_by_name(recorded, mode: str) -> None:  # type: ignore[no-untyped-def]
    session, recorder = recorded(tiny.mixtral(), mode)
    with pytest.raises(
        PrivacyError, match=r"matmul on model\.layers\.0\.mlp\.experts\..* nothing was"
    ):
        session.model()(IDS)
    assert recorder.asked  # the attention came first
    check_nothing_open(recorder, mode)


@pytest.mark.parametrize("mode", MODES)
def test_experts_of_their_own_are_refused_by_name(recorded, mode: str) -> None:  # type: ignore[no-untyped-def]
    """They are ordinary linear layers, but how many rows each gets is the router's decision."""
    session, recorder = recorded(tiny.switch(), mode)
    with pytest.raises(PrivacyError, match=r"\.experts\.expert_\d\.wi.*nothing was sent"):
        session.model().get_encoder()(IDS)
    assert recorder.asked
    names = [session.weights[w].names[0] for asked in recorder.asked for w in asked.weights]
    assert not any(".experts." in name for name in names)


@pytest.mark.parametrize("mode", MODES)
def test_uses_of_a_weight_without_a_form(recorded, mode: str) -> None:  # type: ignore[no-untyped-def]
    session, recorder = recorded(tiny.llama(), mode)
    model = session.model()
    weight = model.model.layers[0].mlp.up_proj.weight  # (64, 32)
    uses = {
        r"weight_matmul on model\.layers\.0\.mlp\.up_proj": lambda: weight @ torch.ones(32, 3),
        r"matmul on .*up_proj.*looked at in part": lambda: torch.ones(2, 32) @ weight[:5].t(),
        r"up_proj.*looked at in part": lambda: torch.ones(2, 16) @ weight[:, :16].t(),
    }
    for match, use in uses.items():
        with pytest.raises(PrivacyError, match=match):
            use()
    for op in (Op.BATCHED_MATMUL, Op.GROUPED_MATMUL, Op.CONVOLUTION, Op.CONVOLUTION_INPUT_GRAD):
        with pytest.raises(PrivacyError, match=op.name.lower()):
            session.exchange(op, weight._weight, (), (torch.ones(2, 32),))
    assert recorder.asked == []


def test_the_way_out_lets_nothing_but_residues_pass(recorded) -> None:  # type: ignore[no-untyped-def]
    """Whatever a mistake above it may send."""
    session, recorder = recorded(tiny.llama(), "masked-local")
    x = torch.ones(2, 32)
    attempts = [(Op.LINEAR, x), (Op.RING_LINEAR, x), (Op.EMBEDDING, IDS), (Op.CHAIN, x)]
    for op, tensor in attempts:
        with pytest.raises(PrivacyError, match="nothing was sent"):
            session._exchange(op, (2,), (NO_BIAS,), (), (), (tensor,), True, False)
    assert recorder.asked == []


def test_transposes_are_the_other_product(recorded) -> None:  # type: ignore[no-untyped-def]
    session, recorder = recorded(tiny.llama(), "masked-local")
    weight = session.model().model.layers[0].mlp.up_proj.weight
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x @ weight.t(), torch.nn.functional.linear(x, weight))
    check_nothing_open(recorder, "masked-local")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", [Op.LINEAR, Op.MATMUL])
@pytest.mark.parametrize("forward", [True, False])
def test_an_input_of_another_width(recorded, mode: str, op: Op, forward: bool) -> None:  # type: ignore[no-untyped-def]
    session, recorder = recorded(tiny.llama(), mode)
    (up,) = (id for id, w in session.weights.items() if "0.mlp.up_proj" in w.names[0])
    with pytest.raises(InvalidInput, match=r"up_proj\.weight: it takes \d\d inputs, not 31"):
        session.product(op, torch.ones(2, 31), up, (), NO_BIAS, forward=forward)
    assert recorder.asked == []


# The executor


PLAIN_OPS = [op for op in Op if op not in RING_OPS]


@pytest.mark.parametrize("op", PLAIN_OPS, ids=lambda op: op.name.lower())
def test_an_executor_ends_a_masked_session_that_sends_anything_else(serve: Serve, op: Op) -> None:
    executor, url = serve(tiny.llama(), masked=(8,))
    number = weight_id(executor, "0.mlp.up_proj.weight")
    with RawClient(url, greet=False) as client:
        client.send(raw.hello(masked=8))
        assert client.receive().kind == raw.WELCOME
        ids = op is Op.EMBEDDING
        meta = raw.exchange_meta(
            op, (1 if ids else number,), (1, 32), dtype=raw.INT32 if ids else raw.FLOAT32
        )
        client.exchange(5, meta, bytes(4 * 32))
        answer = client.receive()
        assert answer.kind == raw.ERROR
        if op in (Op.LINEAR, Op.EMBEDDING):  # well-formed but for the session
            assert (answer.code, answer.request) == ("protocol", 0)
            assert b"session that is masked" in answer.meta
            assert client.hung_up()
    assert sum(executor._engine.stats.operations.values()) == 0


def test_an_executor_of_this_process_does_the_same(serve: Serve) -> None:
    executor, _ = serve(tiny.llama(), masked=(8,))
    client, _ = executor.attach({"protocol": 1, "client": "x", "masked": 8})
    number = weight_id(executor, "0.mlp.up_proj.weight")
    found = executor.compute(client, exchange(Op.LINEAR, number, torch.ones(1, 32)))
    assert isinstance(found, ProtocolError)
    executor.detach(client)


@pytest.mark.parametrize("offered", [(), (16,)])
def test_an_executor_that_does_not_offer_it_says_what_to_do(
    serve: Serve, offered: tuple[int, ...]
) -> None:
    executor, url = serve(tiny.llama(), masked=offered)
    for base in (url, executor):
        with pytest.raises(ProtocolError, match=r"does not offer masked .* 8-bit .*--masked 8"):
            connect(base, privacy="masked-local")
    with RawClient(url) as client:
        client.send(raw.json_frame(raw.REQUEST, 1, {"get": "ring", "bits": 8}))
        assert client.receive().kind == raw.ERROR


def test_an_executor_that_knows_nothing_of_masks(serve: Serve, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """An older one would ignore the key in HELLO and greet as ever."""
    _, url = serve(tiny.llama())
    greet = Executor.attach

    def attach(self: Executor, hello: dict[str, object], *rest: object) -> object:
        known = {k: v for k, v in hello.items() if k != "masked"}
        client, welcome = greet(self, known, *rest)  # type: ignore[arg-type]
        return client, {k: v for k, v in welcome.items() if k != "masked"}

    monkeypatch.setattr(Executor, "attach", attach)
    with pytest.raises(PrivacyError, match=r"does not offer masked.*--masked 8"):
        connect(url, privacy="masked-local")


BAD_RING = {
    "floats": exchange(Op.RING_LINEAR, 2, torch.ones(1, 32)),
    "one dimension": exchange(Op.RING_LINEAR, 2, torch.ones(32, dtype=torch.int32)),
    "three": exchange(Op.RING_LINEAR, 2, torch.ones(1, 1, 32, dtype=torch.int32)),
    "a width": exchange(Op.RING_LINEAR, 2, torch.ones(1, 31, dtype=torch.int32)),
    "other bits": exchange(Op.RING_LINEAR, 2, torch.ones(1, 32, 3, dtype=torch.int16)),
    "the embedding": exchange(Op.RING_LINEAR, 1, torch.ones(1, 32, dtype=torch.int32)),
    "a recipe": exchange(
        Op.RING_LINEAR, 2, torch.ones(1, 32, dtype=torch.int32), recipe=(1, 2, 0, 1)
    ),
    "a bias": exchange(Op.RING_LINEAR, 2, torch.ones(1, 32, dtype=torch.int32), biases=(1,)),
    "parameters": exchange(Op.RING_LINEAR, 2, torch.ones(1, 32, dtype=torch.int32), params=(1,)),
    "a short key": exchange(
        Op.RING_MASK, 2, torch.ones(31, dtype=torch.uint8), params=(10, 8, 1, 0)
    ),
    "no number": exchange(Op.RING_MASK, 2, torch.ones(32, dtype=torch.uint8), params=(10, 8, 1)),
    "no rows": exchange(Op.RING_MASK, 2, torch.ones(32, dtype=torch.uint8), params=(10, 8, 0, 0)),
    "another op": exchange(Op.RING_MASK, 2, torch.ones(32, dtype=torch.uint8), params=(1, 8, 1, 0)),
    "negative": exchange(Op.RING_MASK, 2, torch.ones(32, dtype=torch.uint8), params=(10, 8, 1, -1)),
    "too many rows": exchange(
        Op.RING_MASK, 2, torch.ones(32, dtype=torch.uint8), params=(10, 8, 2**32 - 1, 0)
    ),
    "no shared input": exchange(
        Op.RING_MASK, (2, 8), torch.ones(32, dtype=torch.uint8), params=(10, 8, 1, 0)
    ),
}


@pytest.mark.parametrize("name", BAD_RING)
def test_malformed_ring_exchanges_are_refused(serve: Serve, name: str) -> None:
    executor, _ = serve(tiny.llama(), masked=(8,))
    assert weight_id(executor, "0.mlp.down_proj.weight") == 8
    client, _ = executor.attach({"protocol": 1, "client": "x", "masked": 8})
    outcome = executor.compute(client, BAD_RING[name])
    assert isinstance(outcome, (PrivacyError, ProtocolError)) or outcome.code in (
        "invalid-input", "unknown-weight"
    )  # fmt: skip
    assert sum(executor._engine.stats.operations.values()) == 0


# Mask sources


def test_a_helper_must_not_be_the_executor(serve: Serve) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    with pytest.raises(PrivacyError, match="helper is the executor itself"):
        connect(url, privacy=Privacy(mode="masked-split", helper=url))


def test_a_helper_must_not_be_the_executor_by_another_name(serve: Serve, tmp_path: Path) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    itself = "helper is the executor itself .*other address"
    with Recorder(tmp_path, url) as recorder, pytest.raises(PrivacyError, match=itself):
        connect(url, privacy=Privacy(mode="masked-split", helper=recorder.url), arena_bytes=0)


def test_a_helper_must_host_the_same_weights(serve: Serve) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    _, helper = serve(tiny.llama(seed=1), masked=(8,))
    with pytest.raises(PrivacyError, match="hosts other weights"):
        connect(url, privacy=Privacy(mode="masked-split", helper=helper))


def test_a_helper_that_has_gone_is_an_error_and_nothing_more(recorded) -> None:  # type: ignore[no-untyped-def]
    session, recorder = recorded(tiny.llama(), "masked-split")
    model = session.model()
    model(IDS)
    session._masking._source._helper.close()  # as if its operator had ended it for good
    for _ in range(3):
        with pytest.raises(ConnectionLost):
            model.generate(IDS, max_new_tokens=3)
    check_nothing_open(recorder, "masked-split")


def test_closing_does_not_wait_for_a_helper_that_has_gone(serve: Serve) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    helper, helper_url = serve(tiny.llama(), masked=(8,))
    privacy = Privacy(mode="masked-split", helper=helper_url)
    session = connect(url, privacy=privacy, retry_s=3600)
    model = session.model()
    model(IDS)
    waits = threading.Event()
    wait = session._masking._source._helper._closing.wait
    session._masking._source._helper._closing.wait = lambda s: waits.set() or wait(s)
    helper.close()
    found: list[object] = []

    def ask() -> None:
        try:
            model(tiny.tokens(2, 5))
        except ConnectionLost as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert waits.wait(60)
    session.close()
    thread.join(60)
    assert len(found) == 1


@pytest.mark.parametrize("priority", ["auto", "training", "interactive"])
def test_a_helper_knows_who_waits(serve: Serve, priority: str) -> None:
    """The masks of a fine-tuning job must not go before the helper's decoders."""
    _, url = serve(tiny.llama(), masked=(8,))
    helper, helper_url = serve(tiny.llama(), masked=(8,))
    asked: list[Priority] = []
    submit = helper._engine.submit

    def noted(client: int, one: Exchange, *rest: object) -> None:
        asked.append(one.priority)
        submit(client, one, *rest)  # type: ignore[arg-type]

    helper._engine.submit = noted  # type: ignore[method-assign]
    privacy = Privacy(mode="masked-split", helper=helper_url, ahead=0)
    with connect(url, privacy=privacy, priority=priority) as session:  # type: ignore[arg-type]
        model = session.model()
        for record in (True, False):
            asked.clear()
            with torch.set_grad_enabled(record):
                model(IDS)
            training = priority == "training" or (priority == "auto" and record)
            assert set(asked) == {Priority.TRAINING if training else Priority.INTERACTIVE}


@pytest.mark.parametrize("mode", ["masked-local", "noise"])
def test_weights_from_a_folder_and_none_fetched(serve: Serve, tmp_path: Path, mode: str) -> None:
    """With an executor that keeps its weights to itself."""
    model = tiny.llama()
    _, url = serve(model, masked=(8,), fetch="deny")
    model.save_pretrained(tmp_path / "weights")
    privacy = Privacy(mode=mode, weights=tmp_path / "weights")  # type: ignore[arg-type]
    with connect(url, privacy=privacy) as session:
        logits = session.model()(IDS).logits
        assert session.stats().fetched_bytes == 0
    assert float((logits - model(IDS).logits).norm() / model(IDS).logits.norm()) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_an_executor_that_keeps_its_weights(serve: Serve, mode: str) -> None:
    _, url = serve(tiny.llama(), masked=(8,), fetch="deny")
    _, helper = serve(tiny.llama(), masked=(8,))
    split = helper if mode == "masked-split" else None
    with connect(url, privacy=Privacy(mode=mode, helper=split)) as session:  # type: ignore[arg-type]
        with pytest.raises(PrivacyError, match=r"embed_tokens.*--privacy-weights"):
            session.model()(IDS)
        assert session.stats().exchanges == 0


def test_the_folder_of_another_model(serve: Serve, tmp_path: Path) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    tiny.llama(seed=1).save_pretrained(tmp_path / "weights")
    privacy = Privacy(mode="masked-local", weights=tmp_path / "weights")
    with connect(url, privacy=privacy) as session:
        with pytest.raises(PrivacyError, match=r"embed_tokens\.weight .*digests differ"):
            session.model()(IDS)
        with pytest.raises(PrivacyError, match=r"q_proj\.weight .*digests differ"):
            session.model().model.layers[0].self_attn.q_proj(torch.ones(1, 32))
        assert session.stats().exchanges == 0
    save_file({"model.embed_tokens.weight": torch.ones(3, 3)}, tmp_path / "weights/x.safetensors")
    with connect(url, privacy=privacy) as session, pytest.raises(PrivacyError, match="the shape"):
        session.model()(IDS)


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_whose_embedding_is_another(serve: Serve, tmp_path: Path, mode: str) -> None:
    """Another release of the same model: in every mode, pinned or not; wrong text, unnoticed."""
    _, url = serve(tiny.llama(), masked=(8,))
    _, helper = serve(tiny.llama(), masked=(8,))
    model = tiny.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    model.save_pretrained(tmp_path / "weights")
    split = helper if mode == "masked-split" else None
    privacy = Privacy(mode=mode, helper=split, weights=tmp_path / "weights")  # type: ignore[arg-type]
    pinned = None
    for _ in range(2):
        with connect(url, privacy=privacy, expect_digest=pinned) as session:
            pinned = session.digest
            with pytest.raises(PrivacyError, match=r"embed_tokens\.weight .*digests differ"):
                session.model()(IDS)
            assert session.stats().exchanges == 0


def test_the_digests_of_another_model(serve: Serve, tmp_path: Path) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    tiny.llama().save_pretrained(tmp_path / "weights")
    _, other = serve(tiny.llama(seed=1))
    privacy = Privacy(mode="masked-local", weights=tmp_path / "weights")
    with connect(url, privacy=privacy) as session, connect(other) as second:
        listed = second._request({"get": "digest"})
        ask = session._request
        session._request = lambda q: listed if q == {"get": "digest"} else ask(q)
        with pytest.raises(ModelError, match="digests of another model"):
            session.model()(IDS)


def test_a_folder_that_lacks_a_weight(serve: Serve, tmp_path: Path) -> None:
    _, url = serve(tiny.llama(), masked=(8,), fetch="deny")
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "x.safetensors")
    privacy = Privacy(mode="masked-local", weights=tmp_path)
    lacking = r"embed_tokens.*lacks it, give a folder with the whole"
    with connect(url, privacy=privacy) as session, pytest.raises(PrivacyError, match=lacking):
        session.model()(IDS)


@pytest.mark.parametrize("told", ["scales", "norms"])
@pytest.mark.parametrize("own", [True, False])
def test_told_scales_and_norms_are_those_of_the_integers(
    serve: Serve, tmp_path: Path, told: str, own: bool
) -> None:
    """With the right digest: the answers would be wrong, and wrap around with small norms."""
    executor, url = serve(tiny.llama(), masked=(8,))
    tiny.llama().save_pretrained(tmp_path / "weights")
    facts, scales = executor.weights.ring_facts[8]
    if told == "scales":
        scales = save({name: 3 * value for name, value in load(scales).items()})
    else:
        weights = [{**w, "norms": [n / 1e4 for n in w["norms"]]} for w in facts["weights"]]  # type: ignore[attr-defined]
        facts = {**facts, "weights": weights}  # type: ignore[dict-item]
    executor.weights.ring_facts[8] = facts, scales
    privacy = Privacy(mode="masked-local", weights=tmp_path / "weights" if own else None)
    with connect(url, privacy=privacy) as session:
        with pytest.raises(PrivacyError, match=r"other scales or norms of .*proj"):
            session.model()(IDS)
        assert session.stats().exchanges == 0


def test_a_folder_without_weights(serve: Serve, tmp_path: Path) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    with pytest.raises(PrivacyError, match=r"no weights in .*safetensors"):
        connect(url, privacy=Privacy(mode="masked-local", weights=tmp_path))
    (tmp_path / "x.safetensors").write_bytes(b"no such file")
    with pytest.raises(PrivacyError, match=r"cannot read .*x\.safetensors"):
        connect(url, privacy=Privacy(mode="masked-local", weights=tmp_path))
    with connect(url) as healthy:  # and nobody is left behind
        for _ in range(500):
            if len(healthy.executor_stats()["clients"]) == 1:
                break
        assert len(healthy.executor_stats()["clients"]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_takes_fp32_alone(serve: Serve, dtype: torch.dtype) -> None:
    _, url = serve(tiny.llama().to(dtype))
    with connect(url, privacy="noise") as session:
        with pytest.raises(PrivacyError, match=r"fp32 alone.*masked mode"):
            session.model()(IDS)
        assert session.stats().exchanges == 0


def test_a_model_with_weights_that_are_no_numbers(serve: Serve) -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*cannot be offered masked"):
        serve(model, masked=(8,))


def test_answers_that_are_not_what_was_asked_for(serve: Serve, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    _, url = serve(tiny.llama(), masked=(8, 16))
    for bits in (8, 16):
        privacy = Privacy(mode="masked-local", bits=bits)  # type: ignore[arg-type]
        with connect(url, privacy=privacy, retry_s=0) as session:
            model = session.model()
            for wrong in (lambda y: y[:1], lambda y: y.float(), lambda y: y[..., :1]):
                with monkeypatch.context() as patch:
                    patch.setattr(ring, "to_wire", lambda y, wrong=wrong: wrong(y).contiguous())
                    with pytest.raises(ProtocolError, match="answered a masked exchange with"):
                        model(IDS)


def test_masked_weights_that_are_described_badly(serve: Serve, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    _, url = serve(tiny.llama(), masked=(8,))
    answer = Executor.answer
    changes = [{"axis": 2}, {"norms": [1.0]}, {"norms": [float("nan"), 1]}, {"id": 999}, {"id": 1}]
    for change in changes:

        def changed(self: Executor, client: int, question: dict[str, object]) -> object:
            found, payload = answer(self, client, question)
            if question["get"] == "ring":
                weights: list[dict[str, object]] = found["weights"]  # type: ignore[assignment]
                found = {**found, "weights": [{**weights[0], **change}, *weights[1:]]}  # noqa: B023
            return found, payload

        monkeypatch.setattr(Executor, "answer", changed)
        with pytest.raises(ProtocolError, match="described its masked weights badly"):
            connect(url, privacy="masked-local")


def test_masked_products_have_no_random_check_yet(serve: Serve) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    with pytest.raises(ValueError, match=r"verify= has no check for masked products"):
        connect(url, privacy="masked-local", verify=0.5)


def test_a_digest_is_pinned_in_every_mode(serve: Serve) -> None:
    _, url = serve(tiny.llama(), masked=(8,))
    with connect(url, privacy="masked-local") as session:
        digest = session.digest
    with connect(url, privacy="masked-local", expect_digest=digest) as session:
        session.model()(IDS)
    with pytest.raises(ModelError):
        connect(url, privacy="masked-local", expect_digest="0" * len(digest))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"mode": "private"}, "plain, noise, masked-local, masked-split"),
        ({"bits": 4}, "8 or 16"),
        ({"mode": "masked-split"}, "second executor"),
        ({"helper": "unix:///x.sock"}, "second executor"),
        ({"buckets": (4, 4)}, "rising"),
        ({"buckets": ()}, "rising"),
        ({"buckets": "primes"}, "rising"),
        ({"pool": 0}, "at least 1"),
        ({"ahead": -1}, "0 or more"),
    ],
)
def test_settings_that_make_no_sense(fields: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Privacy(**fields)  # type: ignore[arg-type]


def test_nothing_leaves_in_a_training_step_either(recorded) -> None:  # type: ignore[no-untyped-def]
    session, recorder = recorded(tiny.llama(), "masked-local")
    model = peft.get_peft_model(session.model(), peft.LoraConfig(target_modules="all-linear"))
    model(IDS, labels=IDS).loss.backward()
    assert {asked.op for asked in recorder.asked} == {Op.RING_LINEAR, Op.RING_MATMUL}
    check_nothing_open(recorder, "masked-local")
    kinds = {kind for kind, _ in recorder.frames}
    assert kinds == {Kind.HELLO, Kind.REQUEST, Kind.EXCHANGE}
    asked_for = {str(r.get("get")) for r in recorder.requests if "protocol" not in r}
    # the digest is asked for only where the executor still hashed when it said WELCOME
    assert asked_for - {"digest"} == {"ring", "files", "parameters", "weight"}
