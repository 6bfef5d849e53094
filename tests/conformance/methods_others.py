"""Every registered method but LoRA: one row each, more where a method has kinds of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from conformance.methods_models import Subject
from conformance.methods_rows import Options, Row, on_square, on_targets


def _tasks(ids: Tensor) -> dict[str, Any]:
    return {"task_ids": torch.arange(len(ids)) % 2}


def _ia3(subject: Subject) -> Options:
    return {
        "target_modules": list(subject.targets),
        "feedforward_modules": list(subject.targets[2:]),
    }


def _xlora_config(subject: Subject) -> Options:
    return {"hidden_size": 32, "adapters": {}, "xlora_depth": 2, "xlora_size": 8}


def _with_experts(
    model: PreTrainedModel, config: PeftConfig, subject: Subject, experts: Path
) -> PeftModel:
    config.adapters = {"0": str(experts / "first"), "1": str(experts / "second")}
    model.config.use_cache = False  # X-LoRA demands it
    return get_peft_model(model, config)


def _virtual(**options: Any) -> Any:
    return lambda subject: {"num_virtual_tokens": 3, **options}


_CPT = {
    "cpt_token_ids": [5, 6, 7, 8],
    "cpt_mask": [1, 1, 1, 1],
    "cpt_tokens_type_mask": [1, 2, 2, 4],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.95,
}

OTHER_ROWS: tuple[Row, ...] = (
    Row("AdaLoRA", "ADALORA", on_targets(init_r=6, target_r=2, total_step=8, tinit=1, tfinal=2)),
    Row("AdaMSS", "ADAMSS", on_targets(r=8, num_subspaces=2), needs="sklearn"),
    Row("BOFT", "BOFT", on_targets(boft_block_size=4, boft_n_butterfly_factor=2)),
    Row("Llama-Adapter", "ADAPTION_PROMPT", lambda s: {"adapter_len": 3, "adapter_layers": 1}),
    Row("IA3", "IA3", _ia3),
    Row("BEFT", "BEFT", on_targets()),
    Row("Lily", "LILY", on_targets(r=4)),
    Row("LoHa", "LOHA", on_targets(r=4)),
    Row("LoKr", "LOKR", on_targets(r=4)),
    Row("OFT", "OFT", on_targets(oft_block_size=4)),
    Row("OFT, COFT", "OFT", on_targets(oft_block_size=4, coft=True, use_cayley_neumann=False)),
    Row("Poly", "POLY", on_targets(r=4, n_tasks=2, n_skills=2), extra=_tasks),
    Row("LN tuning", "LN_TUNING", lambda s: {"target_modules": [s.norm]}),
    Row("VeRA", "VERA", on_square(r=4)),
    Row("FRoD", "FROD", on_square(sparse_rate=0.1, progressbar=False)),
    Row("PVeRA", "PVERA", on_square(r=4)),
    Row("FourierFT", "FOURIERFT", on_targets(n_frequency=20)),
    Row("GLoRA", "GLORA", on_targets(r=4)),
    Row(
        "X-LoRA",
        "XLORA",
        _xlora_config,
        apply=_with_experts,
        note="peft writes the whole base beside the adapters, which fetches it on saving",
    ),
    Row("HRA", "HRA", on_targets(r=4)),
    Row("VB-LoRA", "VBLORA", on_targets(r=4, num_vectors=16, vector_length=8)),
    Row("Uni-LoRA", "UNILORA", on_targets(r=4, theta_d_length=32)),
    Row("MiSS", "MISS", on_targets(r=8)),
    Row("MiSS, Bone", "MISS", on_square(r=8, init_weights="bat")),
    Row("RandLoRA", "RANDLORA", on_square(r=4)),
    Row("RoAd", "ROAD", on_targets(variant="road_1", group_size=4)),
    Row("RoAd 4", "ROAD", on_targets(variant="road_4", group_size=4)),
    Row(
        "Trainable tokens",
        "TRAINABLE_TOKENS",
        lambda s: {"target_modules": [s.embedding], "token_indices": [5, 9]},
    ),
    Row("HiRA", "HIRA", on_targets(r=4)),
    Row("SHiRA", "SHIRA", on_targets(r=4, random_seed=3)),
    Row("C3A", "C3A", on_targets(block_size=4)),
    Row("WaveFT", "WAVEFT", on_targets(n_frequency=20)),
    Row("OSF", "OSF", on_targets(effective_rank=4)),
    Row("DeLoRA", "DELORA", on_targets(r=4)),
    Row("GraLoRA", "GRALORA", on_targets(r=4, gralora_k=2)),
    Row("TinyLoRA", "TINYLORA", on_targets(r=2, u=8)),
    Row("PSOFT", "PSOFT", on_targets(r=4)),
    Row("PEANuT", "PEANUT", on_targets(r=4)),
    Row("ShadowPEFT", "SHADOW", lambda s: {"r": 4}),
    Row("Super-tuning", "SUPERTUNING", on_targets(sparsity=0.9)),
    Row("Supra", "SUPERTUNING", on_targets(sparsity=0.9, r=4, lora_alpha=8)),
    Row("DEFT", "DEFT", on_targets(r=4)),
    Row("Prompt tuning", "PROMPT_TUNING", _virtual()),
    Row(
        "Multitask prompt tuning",
        "MULTITASK_PROMPT_TUNING",
        _virtual(num_tasks=2, num_ranks=2),
        extra=_tasks,
    ),
    Row("P-tuning", "P_TUNING", _virtual(encoder_hidden_size=16)),
    Row("Prefix tuning", "PREFIX_TUNING", _virtual()),
    Row(
        "Prefix tuning, projected",
        "PREFIX_TUNING",
        _virtual(prefix_projection=True, encoder_hidden_size=16),
    ),
    Row("Cartridge", "CARTRIDGE", _virtual()),
    Row("CPT", "CPT", lambda s: _CPT),
)
