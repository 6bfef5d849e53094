"""The numbers are those of the whole model, bit for bit, through every transport.

float32 on a CPU; one client at a time, so that every batch is a batch of one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

import tiny
from symbiosis import Executor, Session, connect

Serve = Callable[..., tuple[Executor, str]]


@pytest.fixture(params=["inproc", "unix", "tcp", "lent"])
def remote(request: pytest.FixtureRequest, architecture: str, serve: Serve) -> Iterator[Session]:
    """A session with an executor that hosts ``architecture``."""
    executor, url = serve(
        tiny.BUILDERS[architecture](), tcp=request.param == "tcp", lend=request.param == "lent"
    )
    with connect(executor if request.param == "inproc" else url) as session:
        yield session


def with_lora(model: PreTrainedModel, architecture: str, *, seed: int = 3) -> torch.nn.Module:
    """LoRA on the attention, with a B that is not zero, so that every gradient flows."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=tiny.attention_of(architecture),
        task_type="CAUSAL_LM",
        fan_in_fan_out=architecture == "gpt2",
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()
    }


def train(model: torch.nn.Module, steps: int) -> list[float]:
    """AdamW on batches that are always the same; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        batch = tiny.tokens(seed=step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_logits_and_loss(remote: Session, architecture: str) -> None:
    local, model, ids = tiny.BUILDERS[architecture](), remote.model(), tiny.tokens()
    for _ in range(3):  # the first pass learns which products go together
        expected, found = local(ids, labels=ids), model(ids, labels=ids)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)


def test_padded_batches(remote: Session, architecture: str) -> None:
    local, model, ids = tiny.BUILDERS[architecture](), remote.model(), tiny.tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    with torch.no_grad():
        expected = local(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 8}], ids=str)
def test_generation(remote: Session, architecture: str, how: dict[str, object]) -> None:
    generated = []
    for model in (tiny.BUILDERS[architecture](), remote.model()):
        torch.manual_seed(5)
        ids = tiny.tokens(2, 4)
        generated.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                **{"do_sample": False, **how},
            )
        )
    assert torch.equal(generated[0], generated[1])


def test_gradients_of_an_adapter(remote: Session, architecture: str) -> None:
    gradients = []
    for model in (tiny.BUILDERS[architecture](), remote.model()):
        adapted = with_lora(model, architecture)
        for _ in range(2):
            adapted.zero_grad()
            adapted(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
        gradients.append(
            {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        )
    local, found = gradients
    assert local.keys() == found.keys()
    assert local
    for name, gradient in local.items():
        assert torch.equal(found[name], gradient), name
        assert gradient.any()


def test_fifty_steps_give_the_adapter_of_plain_peft(serve: Serve, architecture: str) -> None:
    adapters, losses = [], []
    _, url = serve(tiny.BUILDERS[architecture]())
    with connect(url) as session:
        for model in (tiny.BUILDERS[architecture](), session.model()):
            adapted = with_lora(model, architecture)
            before = adapter_of(adapted)
            losses.append(train(adapted, 50))
            adapters.append(adapter_of(adapted))
    assert losses[0] == losses[1]
    for name, value in adapters[0].items():
        assert torch.equal(adapters[1][name], value), name
        assert not torch.equal(before[name], value)


def test_a_deep_copy_is_as_exact(serve: Serve, architecture: str) -> None:
    _, url = serve(tiny.BUILDERS[architecture]())
    with connect(url) as session, torch.no_grad():
        model = session.model()
        twin = copy.deepcopy(model)
        for _ in range(2):
            assert torch.equal(twin(tiny.tokens()).logits, model(tiny.tokens()).logits)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModel])
def test_another_head_on_the_same_base(serve: Serve, architecture: str, auto_class: type) -> None:
    _, url = serve(tiny.BUILDERS[architecture]())
    with connect(url) as session:
        model = session.model(auto_class=auto_class)
        torch.manual_seed(0)
        local = type(model)(model.config).eval()
        missing = local.load_state_dict(
            tiny.BUILDERS[architecture]().state_dict(), strict=False
        ).missing_keys
        if auto_class is AutoModel:
            base = tiny.BUILDERS[architecture]().base_model
            local.load_state_dict(base.state_dict())
            assert not [p for p in model.parameters() if p.requires_grad]
        else:
            trainable = [name for name, p in model.named_parameters() if p.requires_grad]
            assert trainable == missing == ["score.weight"]
            assert model.score.weight.std() > 0
            model.score.load_state_dict(local.score.state_dict())
        ids = tiny.tokens()
        with torch.no_grad():
            found, expected = model(ids), local(ids)
        assert torch.equal(found[0], expected[0])


def test_a_new_head_can_be_trained(serve: Serve) -> None:
    _, url = serve(tiny.llama())
    with connect(url) as session:
        model = session.model(auto_class=AutoModelForSequenceClassification)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        ids, labels = tiny.tokens(4), torch.tensor([0, 1, 0, 1])
        losses = []
        for _ in range(10):
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0]
        assert session.stats().fetched_bytes == 0
