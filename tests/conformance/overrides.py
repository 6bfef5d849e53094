"""What the rules cannot know about an architecture's configuration, by model type.

``start``: arguments for the configuration to begin with; ``fields``: what the result must have;
``seed``: of the weights, where the usual one makes a model whose output is 0.
"""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_AUDIO = {"fields": {"conv_dim": [32] * 7, "num_conv_pos_embedding_groups": 4}}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2]}

_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_NO_EXTRAS = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # text
    "bamba": {"fields": {"attn_layer_indices": [1]}},
    "granitemoehybrid": {"fields": {"layer_types": ["mamba", "attention"]}},
    "recurrent_gemma": {"fields": {"block_types": ["recurrent", "attention"]}},
    "longcat_flash": {"fields": {"head_dim": 8}},
    "xlstm": {"fields": {"hidden_size": 128}},
    "led": {"fields": {"attention_window": 4}},
    "rwkv": {"fields": {"use_cache": False}},
    "xmod": {"fields": {"default_language": "en_XX"}},
    "blt": {
        "fields": {
            "encoder_hash_byte_group_vocab": 64,
            "encoder_hash_byte_group_size": [3, 4],
            "num_hidden_layers": 2,
        }
    },
    "cohere_compass_text": {
        "start": {
            "layer_types": ["sliding_attention", "full_attention"] * 20,
            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        }
    },
    "dbrx": {"fields": {"attn_config": {"rope_theta": 10000.0}}},
    "dots3_note_vision_encoder": {"fields": {"adapter_in_dim": 64, "adapter_out_dim": 64}},
    "dots3_note_audio_encoder": {"fields": {"adapter_out_dim": 64, "adapter_input_size": 64}},
    "dots3_note_text": {"fields": {"num_key_value_heads": 4}},
    "gemma4_assistant": {
        "start": {"text_config": _NO_EXTRAS},
        "fields": {"text_config": {**_NO_EXTRAS, "num_kv_shared_layers": 2}},
    },
    "gpt_neo": {"fields": {"attention_types": [[["global", "local"], 1]], "window_size": 4}},
    "lfm2_moe": {"fields": {"layer_types": ["conv", "full_attention"]}},
    "mamba2": {"fields": {"num_heads": 8}},
    "qwen4_exp_text": {
        "fields": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 64,
            "split_ngram_parts": 2,
            "heads_per_ngram": 2,
            "hc_lowrank": 8,
        }
    },
    "reformer": {
        "fields": {
            "is_decoder": True,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [2, 4],
            "max_position_embeddings": 8,
            "axial_pos_embds_dim": [16, 48],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
        }
    },
    "zamba": {
        "fields": {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        }
    },
    "funnel": {"fields": {"block_sizes": [1, 1], "d_inner": 128}},
    # pictures
    "swin": {"fields": {"embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}},
    "swinv2": {
        "fields": {"embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    },
    "resnet": {"fields": {"embedding_size": 16, **_STAGES}},
    "convnext": {"fields": {**_STAGES, "num_stages": 2}},
    "convnextv2": {"fields": {**_STAGES, "num_stages": 2}},
    "efficientnet": {
        "fields": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
        | {"initializer_range": 0.3}
    },
    "dpt": {
        "seed": 2,
        "fields": {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
            "initializer_range": 0.1,
        },
    },
    "sam_vision_model": {"fields": {"num_pos_feats": 32, "global_attn_indexes": [1]}},
    "mobilenet_v2": {"fields": {"depth_multiplier": 0.25}},
    "segformer": {
        "fields": {
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "decoder_hidden_size": 16,
        }
    },
    "hiera": {
        "fields": {
            "embed_dim": 16,
            "image_size": [32, 32],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 4, 8],
        }
    },
    # sound
    "wav2vec2": _AUDIO,
    "hubert": _AUDIO,
    "wavlm": _AUDIO,
    "data2vec-audio": _AUDIO,
    "encodec": {"fields": {"num_filters": 4}},
    "vits": {"fields": {"upsample_initial_channel": 32, "pad_token_id": 0}},
    # pictures and text
    "qwen2_vl_text": {"fields": {"rope_parameters": _SECTIONS}},
    "qwen2_5_vl_text": {"fields": {"rope_parameters": _SECTIONS}},
    "llava_next": {"fields": {"image_grid_pinpoints": [[32, 64], [64, 32]]}},
    "blip-2": {"fields": {"image_token_index": 99}},
    "internvl_vision": {"fields": {"image_size": [32, 32], "patch_size": [8, 8]}},
}
