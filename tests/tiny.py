"""Tiny random models, made from configurations: real architectures, no files, no network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

VOCABULARY = 96
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """Two layers of 32 features; the same seed gives the same numbers."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **_IDS,
        **overrides,
    }
    return _filled(LlamaForCausalLM, LlamaConfig(**settings), seed)


def llama_with_biases() -> LlamaForCausalLM:
    return llama(attention_bias=True, mlp_bias=True)


def tied_llama() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def gpt2() -> GPT2LMHeadModel:
    """Conv1D layers with biases, learned positions, tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_IDS,
    )
    return _filled(GPT2LMHeadModel, config, 0)


def mixtral() -> MixtralForCausalLM:
    """Four experts, two for each token."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        **_IDS,
    )
    return _filled(MixtralForCausalLM, config, 0)


def switch() -> SwitchTransformersForConditionalGeneration:
    """Four experts that are linear layers of their own, in every second layer."""
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
        **_IDS,
    )
    return _filled(SwitchTransformersForConditionalGeneration, config, 0)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-biases": llama_with_biases,
    "llama-tied": tied_llama,
    "gpt2": gpt2,
    "mixtral": mixtral,
}

ATTENTION = {"gpt2": ["c_attn"]}
"""Names of the attention's products, for LoRA; those of a Llama where none are given."""


def attention_of(name: str) -> list[str]:
    return ATTENTION.get(name, ["q_proj", "v_proj"])


def tokens(rows: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length) without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def _filled(cls: type[PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    """A model with random norms and biases too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 3:
                parameter.normal_(std=0.1)
    return model.eval()


def step(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Loss and gradients of the norms, which are the client's own."""
    norms = [p for name, p in model.named_parameters() if "norm" in name or "ln_" in name]
    for norm in norms:
        norm.requires_grad_(True)
    loss = model(ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, norms)]
