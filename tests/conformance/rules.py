"""By which rules a field of a configuration gets small, told from its name alone.

The sizes fit together: 64 features are 4 heads of 16. Knows field names; knows no architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable

FEATURES, HEADS, HEAD = 64, 4, 16
VOCABULARY = 128
LAYERS = 2
POSITIONS = 128
IMAGE = 32

Rule = Callable[[int], int]


def at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


def exactly(size: int) -> Rule:
    """The size itself, but a 0 or 1 (an option that is off) stays."""
    return lambda value: size if value > 1 else value


def _patch(size: int) -> int:
    return size if size <= IMAGE // 2 and IMAGE % size == 0 else 8


_TABLE: list[tuple[str, Rule]] = [
    # attention and state-space heads
    (r"(num_|n_)?(\w+_)?(attention_heads|attn_heads)|n_heads?|num_heads", exactly(HEADS)),
    (r"(swa_|\w*attn_)?(num_|n_)?(key_value|kv)_heads|swa_num_key_value_heads", at_most(2)),
    (r"(index_n_heads|num_query_groups|kv_n_heads)", at_most(2)),
    (r"linear_num_(key|value)_heads|linear_num_heads", exactly(2)),
    (r"qk_rope_head_dim|rotary_dim", exactly(8)),
    (r"qk_head_dim", exactly(HEAD + 8)),
    (
        r"(\w+_)?head_dim|d_kv|kv_channels|dim_head|d_head|attention_head_size|head_size",
        exactly(HEAD),
    ),
    (r"(\w+_)?(d_state|state_size|lora_rank|rank)", at_most(16)),
    (r"(mamba_|n_)?n?groups|mamba_n_groups|n_groups", at_most(2)),
    (r"(\w*_)?(dt_rank|time_step_rank)", at_most(4)),
    # widths
    (
        r"(\w+_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|emb_dim)"
        r"(_global)?|d_model|lru_width|projection_dim|word_embed_proj_dim|dim_model|hidden_dim"
        r"|dim|output_dim|projection_size|vision_output_dim|neck_hidden_sizes|output_channels"
        r"|d_embed|channels|proj_codevector_dim|codevector_dim|classifier_proj_size",
        exactly(FEATURES),
    ),
    (
        r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|mlp_dim|intermediate_dim)(_mlp)?"
        r"|dff|dim_ff|d_ff|feed_forward_size|ffn_dim|n_inner|d_inner|block_ff_dim",
        exactly(2 * FEATURES),
    ),
    # depth
    (
        r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|num_blocks|depth)|(encoder|decoder)_layers"
        r"|num_(encoder|decoder|\w*hidden|\w*transformer)_layers|num_global_layers",
        at_most(LAYERS),
    ),
    (r"(attn|expert)_layer_period|full_attention_interval|layer_group_size", at_most(2)),
    (r"(attn|expert)_layer_offset", at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", at_most(1)),
    (r"num_kv_shared_layers", at_most(1)),
    (r"max_window_layers|moe_layer_end_index", at_most(1)),
    (r"(num_)?(nextn_predict|mtp_num_hidden)_layers|mtp_num_layers", at_most(0)),
    # experts
    (
        r"(num_|n_)?(local_|routed_|moe_)?experts|moe_num_experts|(\w+_)?num_(\w+_)?experts"
        r"|zero_expert_num",
        at_most(4),
    ),
    (r"(\w+_)?num_experts_per_tok(en)?|(\w+_)?top_?k(_experts)?|moe_k", at_most(2)),
    (r"(n|num)_(expert_)?groups?", at_most(2)),
    (r"topk_group", at_most(1)),
    (r"(\w+_)?shared_experts", at_most(1)),
    # vocabulary and positions
    (r"\w*vocab_size\w*|codebook_size|\w*vocab_offset", at_most(VOCABULARY)),
    (
        r"(\w+_)?(max_position_embeddings|max_(en|de)coder_position_embeddings|max_seq_len|max_sequence_length|model_max_length"
        r"|max_source_positions|max_target_positions)|n_positions|n_ctx|context_length|mem_len"
        r"|num_position_embeddings|position_embedding_size|max_length",
        at_most(POSITIONS),
    ),
    (
        r"(\w*)?(sliding_window|attention_window_size|sliding_window_size|local_attention)",
        at_most(8),
    ),
    (r"(\w+_)?chunk_size", lambda value: min(value, 8) if value > 8 else value),
    (r"index_topk", at_most(4)),
    # pictures and sound
    (r"(\w+_)?image_size|crop_size", exactly(IMAGE)),
    (r"(\w+_)?patch_size", _patch),
]

_RULES = [(re.compile(f"(?:{pattern})"), rule) for pattern, rule in _TABLE]

UNSET = {
    "head_dim": HEAD,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "clip_qkv": 8.0,
}
"""For fields that some classes leave at None although their models cannot be built so."""


def small(name: str, value: object) -> object:
    """``value`` of the field ``name``, made small; what no rule speaks of stays."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        rule = next((rule for pattern, rule in _RULES if pattern.fullmatch(name)), None)
        return value if rule is None else rule(value)
    return value
