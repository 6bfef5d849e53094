"""Adapters of the peft library on a remote base; several clients at work at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import PreTrainedModel

import tiny
from symbiosis import Executor, Session, connect
from symbiosis.client.remote_weight import RemoteWeight
from symbiosis.errors import FetchRefused

Serve = Callable[..., tuple[Executor, str]]
Adapter = dict[str, torch.Tensor]


def lora(**options: object) -> LoraConfig:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **options})  # type: ignore[arg-type]


def adapted(model: PreTrainedModel, config: PeftConfig, seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def train(model: PeftModel, steps: int, seed: int = 0) -> Adapter:
    """A few AdamW steps; the adapter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        batch = tiny.tokens(seed=1000 * seed + step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    state = get_peft_model_state_dict(model)
    return {name: value.detach().clone() for name, value in state.items()}


def assert_same(found: Adapter, expected: Adapter, *, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "lora on everything": lambda: lora(target_modules="all-linear"),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "modules to save": lambda: lora(modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_method_trains_as_on_a_local_base(
    session: Session, local: PreTrainedModel, method: str
) -> None:
    adapters = [train(adapted(model, CONFIGS[method]()), 5) for model in (local, session.model())]
    tolerance = 1e-5 if method == "dora" else 0.0
    assert_same(adapters[1], adapters[0], tolerance=tolerance)


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["o_proj", "down_proj", "lm_head"]])
def test_merging_equals_a_local_merge(
    session: Session, local: PreTrainedModel, names: list[str]
) -> None:
    merged = []
    for model in (local, session.model()):
        tuned = adapted(model, lora(target_modules=names))
        train(tuned, 3)
        merged.append(tuned.merge_and_unload())
    for name, parameter in merged[0].named_parameters():
        found = merged[1].get_parameter(name)
        if any(part in name for part in names):
            assert type(found) is not RemoteWeight
            assert torch.equal(found, parameter), name
    ids = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(merged[1](ids).logits, merged[0](ids).logits)


def test_merging_and_unmerging_is_close(session: Session, local: PreTrainedModel) -> None:
    model = adapted(session.model(), lora())
    train(model, 3)
    ids = tiny.tokens()
    with torch.no_grad():
        before = model(ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_merging_is_refused_where_weights_stay(serve: Serve) -> None:
    _, url = serve(tiny.llama(), fetch="deny")
    with connect(url) as session:
        model = adapted(session.model(), lora())
        train(model, 1)
        with pytest.raises(FetchRefused, match=r"proj\.weight"):
            model.merge_and_unload()


@pytest.mark.parametrize(
    ("options", "reader"),
    [
        ({"use_dora": True}, r"\w+ in \w+ \(peft\.tuners\.lora\.dora\)"),
        ({"init_lora_weights": "pissa"}, r"svd in pissa_init \(peft"),
        ({"init_lora_weights": "olora"}, r"qr in olora_init \(peft"),
    ],
)
def test_a_method_that_reads_weights_is_refused_by_name(
    serve: Serve, options: dict[str, object], reader: str
) -> None:
    """Where the weights stay; and the same model goes on with a method that does not."""
    _, url = serve(tiny.llama(), fetch="deny")
    with connect(url) as session:
        with pytest.raises(
            FetchRefused, match=reader + r".* needs the whole of .*does not hand out"
        ):
            adapted(session.model(), lora(**options))
        assert train(adapted(session.model(), lora()), 1)


def test_an_adapter_saved_here_works_there(
    session: Session, local: PreTrainedModel, tmp_path: object
) -> None:
    model = adapted(session.model(), lora())
    train(model, 3)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(local, str(tmp_path))
    ids = tiny.tokens()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_several_adapters_on_one_model(session: Session, local: PreTrainedModel) -> None:
    outcomes = []
    for base in (local, session.model()):
        model = adapted(base, lora(init_lora_weights=False))
        model.add_adapter("second", lora(r=2, init_lora_weights=False))
        logits = []
        with torch.no_grad():
            for name in ("default", "second"):
                model.set_adapter(name)
                logits.append(model(input_ids=tiny.tokens()).logits)
            with model.disable_adapter():
                logits.append(model(input_ids=tiny.tokens()).logits)
        outcomes.append(logits)
    for found, expected in zip(outcomes[1], outcomes[0], strict=True):
        assert torch.equal(found, expected)


# Two clients at once

STEPS = 15
TOLERANCE = 2e-4
"""Between an adapter trained in mixed batches and alone: rows of others change how a kernel sums,
by a few units in the last place for each product, and AdamW makes more of it step by step."""


def train_both(bases: list[str | Executor]) -> list[Adapter]:
    """Two adapters, each in a thread with a session of its own, at the same time."""
    ready = threading.Barrier(2)
    found: dict[int, Adapter] = {}
    models: list[PeftModel] = []
    sessions = [connect(base) for base in bases]
    for seed, session in enumerate(sessions):
        models.append(adapted(session.model(), lora(r=4 + seed), seed))

    def work(seed: int) -> None:
        ready.wait()
        found[seed] = train(models[seed], STEPS, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        session.close()
    return [found[seed] for seed in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> list[Adapter]:
    """What each adapter becomes on a base of its own."""
    return [train(adapted(tiny.llama(), lora(r=4 + seed), seed), STEPS, seed) for seed in (0, 1)]


@pytest.mark.parametrize("transport", ["unix", "inproc"])
@pytest.mark.parametrize("policy", ["align", "greedy", "lockstep", "none"])
def test_two_clients_do_not_disturb_each_other(
    serve: Serve, alone: list[Adapter], policy: str, transport: str
) -> None:
    """Mixed batches to `TOLERANCE`; without batching bit for bit."""
    executor, url = serve(tiny.llama(), policy=policy)
    tolerance = 0.0 if policy == "none" else TOLERANCE
    for adapter, expected in zip(
        train_both([url if transport == "unix" else executor] * 2), alone, strict=True
    ):
        assert_same(adapter, expected, tolerance=tolerance)


def test_mixed_batches_do_not_disturb_either(serve: Serve, alone: list[Adapter]) -> None:
    """As above, until the two have really shared batches: how they meet is up to the threads."""
    executor, url = serve(tiny.llama(), policy="lockstep")
    for _ in range(8):
        for adapter, expected in zip(train_both([url, url]), alone, strict=True):
            assert_same(adapter, expected, tolerance=TOLERANCE)
        with connect(executor) as session:
            if session.executor_stats()["batch_sizes"].get("2", 0) > STEPS:
                return
    raise AssertionError("they never shared a batch")


def test_one_client_in_process_and_one_outside(serve: Serve, alone: list[Adapter]) -> None:
    executor, url = serve(tiny.llama())
    for adapter, expected in zip(train_both([executor, url]), alone, strict=True):
        assert_same(adapter, expected, tolerance=TOLERANCE)
