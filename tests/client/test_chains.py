"""Chains: fewer exchanges for a decoder, and the same bits whatever the model does meanwhile."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.client.trace import Traced
from symbiosis.errors import ExchangeFailed, ExchangeRefused, InvalidInput
from symbiosis.wire.exchange import Exchange, Op, Priority, Result

Serve = Callable[..., tuple[Executor, str]]


@pytest.fixture
def architecture() -> str:
    return "llama"


@pytest.fixture
def base(serve: Serve, architecture: str) -> Iterator[Session]:
    _, url = serve(tiny.BUILDERS[architecture]())
    with connect(url) as session:
        yield session


@torch.no_grad()
def decode(model: nn.Module, tokens: int = 6, rows: int = 1, seed: int = 1) -> Tensor:
    """Greedy decoding; the logits of every step (tokens, rows, vocabulary)."""
    out, steps = model(tiny.tokens(rows, 5, seed), use_cache=True), []
    for _ in range(tokens):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
        steps.append(out.logits[:, -1])
    return torch.stack(steps)


@torch.no_grad()
def exchanges_per_token(base: Session, model: nn.Module, rows: int = 1) -> float:
    decode(model, rows=rows)  # learn
    out = model(tiny.tokens(rows, 5), use_cache=True)
    before = base.stats().exchanges
    for _ in range(4):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
    return (base.stats().exchanges - before) / 4


@pytest.mark.parametrize(
    ("architecture", "most"),
    [("llama", 3), ("llama-biases", 3), ("llama-tied", 3), ("gpt2", 4)],
)
def test_one_exchange_for_each_layer(base: Session, architecture: str, most: int) -> None:
    """Two layers: one exchange up to the first attention, one behind each."""
    local, model = tiny.BUILDERS[architecture](), base.model()
    assert torch.equal(decode(model, 12), decode(local, 12))
    assert exchanges_per_token(base, model) == most
    assert base.plan()[-1][0].endswith(("o_proj.weight", "attn.c_proj.weight"))


@pytest.mark.parametrize("architecture", ["mixtral"])
def test_experts_between_products_end_a_chain(base: Session) -> None:
    local, model = tiny.mixtral(), base.model()
    assert torch.equal(decode(model, 12), decode(local, 12))


@pytest.mark.parametrize("rows", [2, 3])
def test_several_sequences_at_once(base: Session, rows: int) -> None:
    local, model = tiny.llama(), base.model()
    for _ in range(2):
        torch.testing.assert_close(decode(model, 8, rows), decode(local, 8, rows))
    assert base.plan()


def test_each_number_of_rows_is_learned_by_itself(base: Session) -> None:
    local, model = tiny.llama(), base.model()
    for rows in (1, 2, 1):
        assert exchanges_per_token(base, model, rows) == 3
    assert torch.equal(decode(model), decode(local))


def lora(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=4, target_modules=targets, init_lora_weights=False)


METHODS = {
    "lora on q and v": (lambda: lora(["q_proj", "v_proj"]), 3),
    "lora on o": (lambda: lora(["o_proj"]), 3),  # what it adds is sent along
    "lora on up": (lambda: lora(["up_proj"]), 5),  # follows from what the executor computes
    "lora on everything": (lambda: lora(["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]), 5),
    "rank-stabilised": (
        lambda: LoraConfig(r=4, use_rslora=True, target_modules="all-linear", lora_bias=True),
        5,
    ),
    "dora": (lambda: LoraConfig(r=4, use_dora=True, target_modules=["o_proj"]), 7),  # reads weights
    "loha": (
        lambda: LoHaConfig(r=2, target_modules=["o_proj"], init_weights=False),
        7,
    ),  # made anew
    "ia3": (lambda: IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False), 5),
    "prefix": (lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), 3),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_decide_how_long_chains_are(base: Session, method: str) -> None:
    make, most = METHODS[method]
    adapted = []
    for model in (tiny.llama(), base.model()):
        torch.manual_seed(7)
        adapted.append(get_peft_model(model, make()).eval())
    local, remote = adapted
    assert torch.equal(decode(remote, 12), decode(local, 12))
    assert exchanges_per_token(base, remote) == most


@torch.no_grad()
def read(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of every step when ``ids`` (1, n) are given one by one."""
    out, steps = model(ids[:, :5], use_cache=True), []
    for at in range(5, ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values)
        steps.append(out.logits[:, -1])
    return torch.stack(steps)


def test_decoders_of_different_methods_at_once(serve: Serve) -> None:
    """Their chains are computed product by product, with whoever is there."""
    _, url = serve(tiny.llama())
    with contextlib.ExitStack() as stack:
        pairs = []
        for number, (make, _) in enumerate(METHODS.values()):
            pair = []
            for model in (tiny.llama(), stack.enter_context(connect(url)).model()):
                torch.manual_seed(number)
                pair.append(get_peft_model(model, make()).eval())
            pairs.append(pair)
        ids = [tiny.tokens(1, 40, seed) for seed in range(len(pairs))]
        with ThreadPoolExecutor(len(pairs)) as pool:
            found = list(pool.map(read, [remote for _, remote in pairs], ids))
        stats = stack.enter_context(connect(url)).executor_stats()
    for (local, _), one, logits in zip(pairs, ids, found, strict=True):
        torch.testing.assert_close(logits, read(local, one), rtol=1e-4, atol=1e-5)
    computed = sum(int(size) * count for size, count in stats["batch_sizes"].items())
    assert computed > stats["exchanges"], "no chain was computed in parts"


def test_another_adapter_is_noticed_at_once(base: Session) -> None:
    local, model = tiny.llama(), base.model()
    decode(model)
    assert base.plan()
    adapted = []
    for whole in (local, model):
        torch.manual_seed(7)
        adapted.append(get_peft_model(whole, lora(["o_proj"])).eval())
    assert torch.equal(decode(adapted[1], 12), decode(adapted[0], 12))
    with adapted[0].disable_adapter(), adapted[1].disable_adapter():
        assert torch.equal(decode(adapted[1], 12), decode(adapted[0], 12))


def adapted_pair(base: Session, config: LoraConfig) -> tuple[PeftModel, PeftModel]:
    """The same adapter on the whole model and on the split one."""
    pair = []
    for model in (tiny.llama(), base.model()):
        torch.manual_seed(7)
        pair.append(get_peft_model(model, config).eval())
    return pair[0], pair[1]


def test_what_an_adapter_adds_is_computed_with_its_present_weights(base: Session) -> None:
    """Trained in place, replaced, switched and deleted while chains with it are known."""
    local, remote = pair = adapted_pair(base, lora(["v_proj", "o_proj"]))
    assert torch.equal(decode(remote, 12), decode(local, 12))
    for model in pair:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-2.0)
    assert torch.equal(decode(remote, 12), decode(local, 12))
    assert exchanges_per_token(base, remote) == 3
    for model in pair:
        torch.manual_seed(8)
        model.add_adapter("other", lora(["v_proj", "o_proj"]))
        model.set_adapter("other")
    assert torch.equal(decode(remote, 20), decode(local, 20))
    for model in pair:
        model.set_adapter("default")
        model.delete_adapter("other")
        gc.collect()
    assert torch.equal(decode(remote, 20), decode(local, 20))
    assert exchanges_per_token(base, remote) == 3


@torch.no_grad()
def test_random_numbers_are_the_models_own(base: Session) -> None:
    """With dropout at work, what an adapter adds is not computed twice: that would take numbers
    from the model's stream."""
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["o_proj"], init_lora_weights=False)
    local, remote = adapted_pair(base, config)
    found = []
    for model in (local, remote):
        model.train()
        torch.manual_seed(1)
        ids = tiny.tokens(1, 5)
        out, steps = model(ids, use_cache=True), []
        for _ in range(12):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            steps.append(out.logits[:, -1])
        found.append((torch.stack(steps), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@torch.no_grad()
def test_an_input_is_watched_for_one_pass(base: Session) -> None:
    """It is the model's own tensor, or its user's."""
    q, o = [
        base.model().model.layers[0].self_attn.get_parameter(f"{name}_proj.weight") for name in "qo"
    ]
    kept, watched = [], []
    for _ in range(8):
        inputs = torch.randn(1, 1, 32), torch.randn(1, 1, 32)
        for x, weight in zip(inputs, (q, o), strict=True):
            nn.functional.linear(x, weight)
            watched.append(type(x) is Traced)
        kept += inputs
    assert any(watched) and not all(watched)
    base.close()
    assert {type(x) for x in kept} == {Tensor}
    assert not any(vars(x) for x in kept)


def test_a_trained_norm_is_noticed_at_once(base: Session) -> None:
    local, model = tiny.llama(), base.model()
    decode(model)
    assert base.plan()
    for whole in (local, model):
        whole.model.layers[1].input_layernorm.weight.data.mul_(1.5)
    assert torch.equal(decode(model, 12), decode(local, 12))


def test_two_sequences_in_turn_do_not_mix(base: Session) -> None:
    local, model = tiny.llama(), base.model()
    decode(model)

    @torch.no_grad()
    def in_turn(whole: nn.Module) -> list[Tensor]:
        outs = [whole(tiny.tokens(1, n, n), use_cache=True) for n in (4, 6)]
        found = []
        for _ in range(5):
            for i, out in enumerate(outs):
                token = out.logits[:, -1:].argmax(-1)
                outs[i] = whole(token, past_key_values=out.past_key_values)
                found.append(outs[i].logits)
        return found

    for ours, theirs in zip(in_turn(model), in_turn(local), strict=True):
        assert torch.equal(ours[:, -1], theirs[:, -1])


def test_results_changed_in_place_are_noticed(base: Session) -> None:
    """Answers that wait must not be compared with memory that the model changes."""
    q, k = [
        base.model().model.layers[0].self_attn.get_parameter(f"{name}.weight")
        for name in ("q_proj", "k_proj")
    ]
    local = tiny.llama().model.layers[0].self_attn
    x = torch.randn(1, 1, 32)

    @torch.no_grad()
    def a_pass(change: float) -> None:
        inputs = x.clone()
        first = nn.functional.linear(inputs, q)
        assert torch.equal(first, local.q_proj(inputs))
        inputs.mul_(change)
        second = nn.functional.linear(inputs, k[:, :])
        assert torch.equal(second, local.k_proj(inputs))
        third = nn.functional.linear(first, q)
        assert torch.equal(third, local.q_proj(first))

    for change in (1.0,) * 8 + (2.0,) * 4:
        a_pass(change)


def test_what_leaves_the_model_is_a_plain_tensor(base: Session) -> None:
    model = base.model()
    ids = tiny.tokens(1, 5)
    for _ in range(8):
        out = model.generate(
            ids,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert all(type(logits) is Tensor for logits in out.logits)
        for layer in out.past_key_values.layers:
            assert type(layer.keys) is Tensor


def test_a_watched_tensor_that_stays_is_as_good_as_a_plain_one(base: Session) -> None:
    """Hidden states of the traced pass can be kept, computed with and trained on."""
    model = base.model()
    kept = []
    with torch.no_grad():
        out = model(tiny.tokens(1, 5), use_cache=True)
        for _ in range(6):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, output_hidden_states=True)
            kept += out.hidden_states
    watched = [t for t in kept if type(t) is Traced]
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    for hidden in watched:
        copied = copy.deepcopy([hidden])[0]
        assert type(copied) is Tensor
        assert torch.equal(copied, hidden)
        head = nn.Linear(32, 2)
        head(hidden).sum().backward()
        assert head.weight.grad is not None
        assert type(hidden + 1) is Tensor
        into = hidden.clone().as_subclass(Traced)
        into._trace = hidden._trace
        x = torch.randn(1, 1, 64)
        assert torch.matmul(x, weight, out=into) is into
        torch.testing.assert_close(into.as_subclass(Tensor), x @ weight)
    assert torch.equal(torch.stack(kept[:2]), torch.stack([t.clone() for t in kept[:2]]))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])  # experts: by ATen operations
def test_training_is_not_chained_and_has_its_priority(base: Session) -> None:
    """Within an autograd function torch says that gradients are off: it must not be believed."""
    model = get_peft_model(base.model(), lora(["o_proj"]))
    asked = []
    channel = base._channel
    assert channel is not None
    send = channel.exchange

    def watched(exchange: Exchange) -> Result:
        asked.append((exchange.op, exchange.priority))
        return send(exchange)

    channel.exchange = watched  # type: ignore[method-assign]
    for _ in range(6):
        model(tiny.tokens(1, 3), labels=tiny.tokens(1, 3)).loss.backward()
    assert {priority for _, priority in asked} == {Priority.TRAINING}
    assert Op.CHAIN not in {op for op, _ in asked}
    asked.clear()
    decode(model)
    assert {priority for _, priority in asked} == {Priority.INTERACTIVE}
    assert Op.CHAIN in {op for op, _ in asked}


def test_another_dtype_is_learned_anew(base: Session) -> None:
    """What was learned in float32 is not asked for with bfloat16, nor taken for it."""
    local, model = tiny.llama(), base.model()
    assert torch.equal(decode(model), decode(local))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            torch.testing.assert_close(decode(model), decode(local), rtol=2e-2, atol=2e-2)
    assert torch.equal(decode(model, 12), decode(local, 12))
    half = base.model(dtype=torch.bfloat16)
    torch.testing.assert_close(decode(half), decode(tiny.llama().bfloat16()), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("error", [InvalidInput("no such chain"), ExchangeFailed("no memory")])
def test_a_chain_that_is_refused_costs_an_exchange(base: Session, error: ExchangeRefused) -> None:
    local, model = tiny.llama(), base.model()
    channel = base._channel
    assert channel is not None
    send, refused = channel.exchange, 0

    def refuses(exchange: Exchange) -> Result:
        nonlocal refused
        if exchange.op is Op.CHAIN:
            refused += 1
            raise error
        return send(exchange)

    channel.exchange = refuses  # type: ignore[method-assign]
    assert torch.equal(decode(model, 30), decode(local, 30))
    assert 0 < refused < 6  # it is tried again, more and more rarely


@torch.no_grad()
def test_prompts_of_many_lengths_do_not_drive_out_what_is_in_use(base: Session) -> None:
    model = base.model()
    assert exchanges_per_token(base, model) == 3
    for length in range(2, 40):
        out = model(tiny.tokens(1, length), use_cache=True)
        before = base.stats().exchanges
        model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
        assert base.stats().exchanges == before + 3


def test_training_and_prefill_are_exact_beside_chains(base: Session) -> None:
    local, model = tiny.llama(), base.model()
    decode(model)
    ids = tiny.tokens()
    assert torch.equal(model(ids).logits, local(ids).logits)
    embeddings = [whole.get_input_embeddings()(ids).detach() for whole in (local, model)]
    for whole, e in zip((local, model), embeddings, strict=True):
        whole(inputs_embeds=e.requires_grad_()).logits.square().sum().backward()
    assert torch.equal(embeddings[0].grad, embeddings[1].grad)
    assert torch.equal(decode(model), decode(local))


def test_a_restarted_executor_answers_chains_at_once(serve: Serve) -> None:
    """A chain is described whole in each exchange: the executor keeps nothing."""
    executor, url = serve(tiny.llama())
    with connect(url) as session:
        model = session.model()
        expected = decode(model, 8)
        assert session.plan()
        executor.close()
        again = Executor.of(tiny.llama())
        again.listen([url])
        try:
            assert torch.equal(decode(model, 8), expected)
        finally:
            again.close()


@pytest.mark.parametrize(("where", "chained"), [("in process", False), ("unix", True)])
def test_no_chains_where_they_would_make_the_host_wait_for_a_gpu(
    serve: Serve, where: str, chained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU says that it is one."""
    executor, url = serve(tiny.llama())
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.Stream(device="cpu"))
    with connect(url if chained else executor) as session:
        decode(session.model())
        assert bool(session.plan()) is chained
        assert session.stats().grouped > 0
