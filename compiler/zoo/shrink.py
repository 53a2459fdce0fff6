"""A configuration of transformers -> a tiny one of the same architecture.

Fields are changed by their names, whatever the architecture: widths, heads, layers, vocabulary.
What a configuration works out of others (a ``None`` in its class) is left to it. What that does not
make right stands in `special.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

VOCABULARY = 128
LAYERS = 4
LENGTH = 64  # positions

WIDTH, INNER, HEADS, HEAD = 32, 64, 4, 8

_NAMES = (
    (
        WIDTH,
        """hidden_size d_model n_embd dim emb_dim embedding_size embed_dim word_embed_proj_dim
        d_latents attention_hidden_size lru_width projection_dim projection_size out_hidden_size
        pooler_hidden_size pooler_output_size hidden_size_global prediction_head_size
        input_embedding_size output_embedding_size true_hidden_size kv_channels
        vision_output_dim swa_kv_lora_rank swa_q_lora_rank cross_attention_hidden_size
        encoder_hidden_size decoder_hidden_size output_channels adapter_out_dim
        classifier_proj_size backbone_hidden_size embedding_dim hidden_size_per_layer_input
        entity_emb_size embedding_rank""",
    ),
    (
        INNER,
        """intermediate_size d_ff d_inner ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim
        n_inner feed_forward_size ffn_hidden_size moe_intermediate_size
        shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size mlp_dim shared_intermediate_size
        dense_intermediate_size intermediate_size_mlp expert_ffn_hidden_size
        speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim
        router_hidden_size""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers
        num_self_attends_per_block""",
    ),
    (
        LAYERS // 2,
        """encoder_layers decoder_layers speech_encoder_layers t2u_encoder_layers
        t2u_decoder_layers conf_num_hidden_layers num_global_layers""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        num_self_attention_heads num_cross_attention_heads swa_num_attention_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads
        conf_num_attention_heads linear_num_heads linear_num_value_heads""",
    ),
    (
        HEADS // 2,
        """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads
        index_n_heads""",
    ),
    (
        HEAD,
        """head_dim d_kv dim_head d_head swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim
        attention_head_size linear_head_dim linear_key_head_dim linear_value_head_dim
        query_pre_attn_scalar rotary_dim attention_head_dim""",
    ),
    (
        VOCABULARY,
        """vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input
        entity_vocab_size unpadded_vocab_size t2u_vocab_size char_vocab_size shape_vocab_size
        pronunciation_vocab_size codebook_size unit_hifi_gan_vocab_size audio_vocab_size""",
    ),
    (
        LENGTH,
        """max_position_embeddings n_positions max_seq_len model_max_length max_source_positions
        max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings
        t2u_max_position_embeddings max_2d_position_embeddings context_length n_ctx
        max_sequence_length""",
    ),
    (
        4,
        """num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num
        index_topk num_landmarks num_latents""",
    ),
    (
        2,
        """num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k n_group topk_group
        num_expert_group index_topk_blocks o_groups""",
    ),
    (
        8,
        """sliding_window sliding_window_size local_attention attention_window_size
        attention_chunk_size chunk_size mamba_chunk_size index_block_size block_size
        attention_window local_attn_chunk_length lsh_attn_chunk_length window_size_tokens
        global_block_size segment_means_seq_len keep_window_size rel_extent index_head_dim
        kv_lora_rank q_lora_rank o_lora_rank state_size ssm_state_size mamba_d_state
        mamba_n_heads mamba_d_head mamba_headdim mamba_num_heads mamba_head_dim time_step_rank
        mamba_dt_rank laurel_rank adapter_rank hc_lowrank ple_embed_dim loop_gate_rank
        gated_norm_rank num_filters codebook_dim vector_quantization_hidden_dimension
        base_channels groups_width local_radius qk_head_dim""",
    ),
)
"""Sizes, and the fields that get them unless they are smaller already."""

_SIZES = {name: size for size, names in _NAMES for name in names.split()} | {
    "image_size": 32,
    "input_size": 32,
    "patch_size": 8,
    "num_codebooks": 2,
    "num_quantizers": 2,
    "max_window_layers": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_kv_shared_layers": 0,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "mamba_d_ssm": 64,
    "mm_tokens_per_image": 4,
    "num_labels": 3,
}

_TOKENS = {
    "pad": 0,
    "bos": 1,
    "eos": 2,
    "decoder_start": 2,
    "t2u_pad": 0,
    "t2u_bos": 1,
    "t2u_eos": 2,
}
FIRST_SPECIAL = 100  # of the tokens that stand for images and the like; texts have smaller ones

_CHANCE = re.compile(r"drop|_prob$|_noise$|jitter")  # fields that are probabilities, or noise


def shrunk(config: Any, special: Mapping[str, Any] | None = None) -> Any:
    """A new configuration of the same class; no field of it makes a model draw random numbers.

    Args:
        special: fields that get these values, ``a.b`` for one of a configuration inside it.
    """
    special = special or {}
    fields = _fields(config)
    for name, value in special.items():
        if "." not in name:
            fields[name] = value
    for name in getattr(type(config), "sub_configs", ()):
        inner = getattr(config, name, None)
        if hasattr(inner, "to_dict") and name not in special:
            prefix = f"{name}."
            of_it = {k.removeprefix(prefix): v for k, v in special.items() if k.startswith(prefix)}
            fields[name] = shrunk(inner, of_it)
    return type(config)(**fields)


def _fields(config: Any) -> dict[str, Any]:
    """What becomes of each field whose value is not worked out of others."""
    values = vars(config)  # attributes may refuse to be read, where layers differ in them
    given = {
        field.name: values[field.name]
        for field in dataclasses.fields(config)
        if field.name in values
        and (field.default is not None or field.name.endswith(("layer_types", "block_type")))
    }
    layers = next((given[n] for n in ("num_hidden_layers", "n_layer") if n in given), None)
    found = {}
    for i, (name, value) in enumerate(given.items()):
        new = _new(name, value, layers, i)
        if new is not value:
            found[name] = new
    if values.get("num_key_value_heads") == values.get("num_attention_heads"):
        found.pop("num_key_value_heads", None)
        if "num_key_value_heads" in given:
            found["num_key_value_heads"] = HEADS
    return found


def _new(name: str, value: Any, layers: int | None, index: int) -> Any:
    if isinstance(value, (bool, str)) or value is None:
        return value
    if name.endswith(("token_id", "token_index")):
        return _token(name, value, index)
    if isinstance(value, (int, float)) and _CHANCE.search(name):
        return type(value)(0)
    if isinstance(value, (list, tuple)) and _CHANCE.search(name):
        return [0.0] * len(value)
    if isinstance(value, int):
        return min(value, _SIZES.get(name, value)) if value > 0 else value
    if isinstance(value, (list, tuple)) and len(value) == layers:
        return _cycled([_new(name, each, None, index) for each in value])
    return value


def _token(name: str, value: Any, index: int) -> Any:
    kind = re.sub("_token_(id|index)$", "", name)
    if isinstance(value, (list, tuple)):
        return [_token(name, value[0], index)] if value else value
    if kind in _TOKENS:
        return min(value, _TOKENS[kind]) if kind == "decoder_start" else _TOKENS[kind]
    return FIRST_SPECIAL + index % (VOCABULARY - FIRST_SPECIAL)


def _cycled(kinds: Sequence[Any]) -> list[Any]:
    """As many as there are layers, each kind that occurs among them."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[i % len(distinct)] for i in range(max(LAYERS, len(distinct)))]
