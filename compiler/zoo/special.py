"""What single architectures need besides the shrinking by names, which is data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16}
_SWA |= dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_v_head_dim"), 8)
_SWA |= dict.fromkeys(("swa_qk_nope_head_dim", "swa_qk_rope_head_dim"), 8)
_VOICES = ("acoustic", "semantic")
_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE = {"rope_parameters": _DEFAULT}
_KINDS = ("full_attention", "sliding_attention")
_HYBRID = ["linear_attention", "full_attention"] * 2
_GEMMA4 = {"global_head_dim": 8}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8}
_INDEXER |= {"indexer_budget": 8, "indexer_compress_ratio": 2}
_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": 2}
_SWIN |= {"patch_size": 2, "image_size": 32}

FIELDS: dict[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"use_cache": False},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_KINDS, _DEFAULT)},
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "ctrl": {"dff": 64},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots3_note_text": _SWA,
    "dots3_note": {f"text_config.{k}": v for k, v in _SWA.items()},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 100, "token_dropout": False},
    "esmc": {"vocab_size": 128},
    "gemma3n_text": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8},
    "gemma4": {f"text_config.{k}": v for k, v in _GEMMA4.items()},
    "gemma4_assistant": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": 4,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {f"text_config.{k}": v for k, v in _GEMMA4.items()},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hunyuan_v1_dense": _ROPE | {"head_dim": 8},
    "hunyuan_v1_moe": _ROPE | {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "nystromformer": {"segment_means_seq_len": 16, "num_landmarks": 4},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {f"text_config.{k}": v for k, v in _INDEXER.items()},
    "reformer": {
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "lsh"] * 2,
        "num_buckets": 2,
        "hash_seed": 0,
        "attention_head_size": 8,
    },
    "vibevoice_asr": {f"{k}_tokenizer_encoder_config.num_filters": 2 for k in _VOICES},
    "xlstm": {"chunk_size": 16, "mlstm_round_up_to_multiple_of": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    # convolutional networks and transformers of images
    "bit": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 32, 64],
        "depths": [1, 1, 1, 1],
        "num_groups": 4,
    },
    "convnext": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "donut-swin": _SWIN,
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "patch_size": 2},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "hidden_sizes": [16, 32, 32, 64],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 32, 64],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {
        "embed_dim": 16,
        "depths": [1, 1, 2, 1],
        "image_size": [64, 64],
        "num_heads": [1, 2, 4, 8],
        "patch_size": [7, 7],
    },
    "levit": {
        "hidden_sizes": [16, 32, 32],
        "num_attention_heads": [2, 4, 4],
        "depths": [2, 2, 2],
        "key_dim": [8, 8, 8],
        "image_size": 64,
        "patch_size": 16,
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "image_size": 64,
        "patch_size": 2,
    },
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25, "patch_size": 2},
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "pvt": {
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 4, 4],
    },
    "pvt_v2": {
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 4, 4],
    },
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "segformer": {
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
    },
    "swiftformer": {"embed_dims": [16, 16, 32, 32], "depths": [1, 1, 2, 1]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {
        "stem_out_channels": 16,
        "hidden_sizes": [16, 16, 32, 32, 64],
    },
}
"""Model type -> fields of its configuration; ``a.b`` for one of a configuration inside it."""

LENGTHS: dict[str, int] = {"perceiver": 64}
"""Model type -> tokens per row, where `subjects.LENGTH` does not do."""
