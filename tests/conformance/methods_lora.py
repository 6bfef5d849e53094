"""LoRA and every variant that its configuration offers.

`LORA_FIELDS_LEFT` names the fields of the configuration that no row is for, with the reason;
together they are all of its fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from peft import (
    ArrowConfig,
    EvaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    create_arrow_model,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import PreTrainedModel

from conformance.methods_models import Subject
from conformance.methods_rows import Apply, Options, Row, as_it_is, batch, calibrate, plainly

FIRST_TOKENS = [int(id) for id in batch(1)[0, 3:5]]
"""Tokens that occur in the batches, for aLoRA's invocation."""


def _lora(
    name: str,
    *,
    apply: Apply = plainly,
    before_loading: Callable[[PreTrainedModel, PeftConfig], None] = as_it_is,
    trains: bool = True,
    needs: str = "",
    note: str = "",
    covers: str = "",
    **options: Any,
) -> Row:
    def all_options(subject: Subject) -> Options:
        given = {k: v(subject) if callable(v) else v for k, v in options.items()}
        return {"r": 4, "lora_alpha": 8, "target_modules": list(subject.targets), **given}

    return Row(
        name,
        "LORA",
        all_options,
        apply=apply,
        before_loading=before_loading,
        trains=trains,
        needs=needs,
        note=note,
        covers=frozenset({*options, *covers.split()}),
    )


def _with_eva(
    model: PreTrainedModel, config: PeftConfig, subject: Subject, experts: Path
) -> PeftModel:
    tuned = get_peft_model(model, config)
    data = [{"input_ids": batch(seed), "labels": batch(seed)} for seed in range(100, 108)]
    initialize_lora_eva_weights(tuned, data, show_progress_bar=False)
    return tuned


def _prepare_corda(model: PreTrainedModel, config: PeftConfig) -> None:
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which peft does not demand

    preprocess_corda(model, config, run_model=lambda: calibrate(model))


def _with_corda(
    model: PreTrainedModel, config: PeftConfig, subject: Subject, experts: Path
) -> PeftModel:
    _prepare_corda(model, config)
    return get_peft_model(model, config)


def _with_loraga(
    model: PreTrainedModel, config: PeftConfig, subject: Subject, experts: Path
) -> PeftModel:
    def train_step() -> None:
        model(input_ids=batch(100), labels=batch(100)).loss.backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def _with_arrow(
    model: PreTrainedModel, config: PeftConfig, subject: Subject, experts: Path
) -> PeftModel:
    folders = [str(experts / "first"), str(experts / "second")]
    arrow = config.arrow_config
    tuned = create_arrow_model(model, folders[:1], arrow, general_adapter_paths=folders[1:])
    assert isinstance(tuned, PeftModel)
    return tuned


def _with_two(
    model: PreTrainedModel, config: PeftConfig, subject: Subject, experts: Path
) -> PeftModel:
    tuned = get_peft_model(model, config)
    tuned.add_adapter("second", config)
    tuned.base_model.set_adapter(["default", "second"])
    return tuned


def _first_target(value: int) -> Callable[[Subject], dict[str, int]]:
    return lambda subject: {subject.targets[0]: value}


def _loftq(subject: Subject) -> Any:
    return peft.LoftQConfig(loftq_bits=4, loftq_iter=1)


def _bd(subject: Subject) -> BdLoraConfig:
    a, b = subject.bd
    return BdLoraConfig(target_modules_bd_a=list(a), target_modules_bd_b=list(b), nblocks=2)


LORA_ROWS: tuple[Row, ...] = (
    _lora("LoRA", covers="r target_modules lora_alpha task_type fan_in_fan_out"),
    _lora("LoRA, all linear", target_modules="all-linear"),
    _lora("LoRA, head and embedding", target_modules=lambda s: ["lm_head", s.embedding]),
    _lora("LoRA, dropout", lora_dropout=0.2),
    _lora("LoRA, biases", bias="all"),
    _lora("LoRA, `lora_bias`", lora_bias=True),
    _lora("LoRA, rsLoRA", use_rslora=True),
    _lora("LoRA, DoRA", use_dora=True),
    _lora("LoRA, Gaussian", init_lora_weights="gaussian"),
    _lora("LoRA, orthogonal", init_lora_weights="orthogonal"),
    _lora("LoRA, PiSSA", init_lora_weights="pissa"),
    _lora("LoRA, PiSSA by iterations", init_lora_weights="pissa_niter_4"),
    _lora("LoRA, OLoRA", init_lora_weights="olora"),
    _lora("LoRA, MiCA", init_lora_weights="mica"),
    _lora(
        "LoRA, EVA",
        init_lora_weights="eva",
        eva_config=lambda s: EvaConfig(rho=1.0),
        apply=_with_eva,
    ),
    _lora(
        "LoRA, CorDA",
        init_lora_weights="corda",
        corda_config=lambda s: CordaConfig(corda_method="kpm"),
        apply=_with_corda,
        before_loading=_prepare_corda,
        needs="attr",
    ),
    _lora(
        "LoRA, LoRA-GA",
        init_lora_weights="lora_ga",
        lora_ga_config=lambda s: LoraGAConfig(),
        apply=_with_loraga,
    ),
    _lora("LoRA, LoftQ", init_lora_weights="loftq", loftq_config=_loftq, needs="bitsandbytes"),
    _lora("LoRA, KaSA", kasa_config=lambda s: KasaConfig()),
    _lora("LoRA, VeLoRA", velora_config=lambda s: VeloraConfig(num_groups=4)),
    _lora("LoRA, MonteCLoRA", monteclora_config=lambda s: MontecloraConfig(num_samples=2)),
    _lora("LoRA, BD-LoRA", use_bdlora=_bd),
    _lora("LoRA, aLoRA", alora_invocation_tokens=lambda s: FIRST_TOKENS),
    _lora(
        "LoRA, Arrow",
        arrow_config=lambda s: ArrowConfig(top_k=1, use_gks=True, rng_seed=0),
        apply=_with_arrow,
        trains=False,
        note="routes between adapters that are trained already: outputs only",
    ),
    _lora("LoRA, QALoRA", use_qalora=True, qalora_group_size=4),
    _lora(
        "LoRA, `target_parameters`",
        target_modules=[],
        target_parameters=lambda s: list(s.parameters),
        fan_in_fan_out=False,
        note="peft adds a whole change to each whole weight, which the client keeps",
    ),
    _lora("LoRA, `modules_to_save`: head", modules_to_save=["lm_head"]),
    _lora("LoRA, `modules_to_save`: norm", modules_to_save=lambda s: [s.last_norm]),
    _lora("LoRA, `rank_pattern`", rank_pattern=_first_target(2), alpha_pattern=_first_target(3)),
    _lora("LoRA, some layers", layers_to_transform=[1], layers_pattern=lambda s: s.blocks),
    _lora("LoRA, `exclude_modules`", exclude_modules=lambda s: [s.targets[1]]),
    _lora("LoRA, `layer_replication`", layer_replication=[(0, 2), (1, 2)]),
    _lora("LoRA, `trainable_token_indices`", trainable_token_indices=[5, 9]),
    _lora(
        "LoRA, tied weights kept tied",
        modules_to_save=lambda s: [s.embedding],
        ensure_weight_tying=True,
    ),
    _lora("LoRA, two adapters at once", apply=_with_two, covers="init_lora_weights"),
)

LORA_FIELDS_LEFT = {
    "megatron_config": "for Megatron's parallel layers, which transformers' models do not have",
    "megatron_core": "for Megatron's parallel layers, which transformers' models do not have",
    "runtime_config": "where a GPU computes DoRA's initialisation",
    "peft_type": "says what it is",
    "auto_mapping": "says what it is",
    "peft_version": "says what it is",
    "base_model_name_or_path": "says what it is",
    "revision": "says what it is",
    "inference_mode": "says what it is",
}
"""Fields of ``LoraConfig`` that no row is for, and why."""


def uncovered_fields() -> set[str]:
    """Fields of the installed peft's ``LoraConfig`` that are neither in a row nor left out."""
    covered = {name for row in LORA_ROWS for name in row.covers} | set(LORA_FIELDS_LEFT)
    return {field.name for field in dataclasses.fields(LoraConfig)} - covered
