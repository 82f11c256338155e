"""A tiny config of every causal-LM and encoder-decoder type that the installed Transformers knows,
for the sweep over families.

Most types need nothing of their own: whatever field of the default config (and of the configs
inside it) `SIZES` names is made small. `FIELDS` says what a type needs besides.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCAB = 100
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 2, 4, 2, 16

# Size, and the fields that get it.
_SAME = [
    (HIDDEN, "hidden_size d_model n_embd dim_model emb_dim embed_dim embedding_dim "
     "embedding_size input_embedding_size d_inner intermediate_size output_embedding_size "
     "word_embed_proj_dim encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner d_ff dim_ff dff "
     "ffn_hidden_size expert_ffn_hidden_size feed_forward_size lru_width dense_intermediate_size "
     "mlp_dim out_hidden_size output_dim projector_input_dim projector_output_dim "
     "vision_output_dim cross_attention_hidden_size intermediate_size_mlp prompt_mid_dim "
     "router_hidden_size backbone_hidden_size output_channels audio_hidden_size "
     "encoder_hidden_size downsample_hidden_size shape_embed_dim pronunciation_embed_dim "
     "nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel mamba_d_ssm"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
     "num_decoder_layers num_encoder_layers depth speech_encoder_layers t2u_encoder_layers "
     "t2u_decoder_layers num_layers_per_stack num_global_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
     "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
     "attention_heads speech_encoder_attention_heads t2u_encoder_attention_heads "
     "t2u_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
     "swa_num_attention_heads index_n_heads linear_num_attention_heads linear_num_value_heads "
     "zero_expert_num"),
    (KV_HEADS, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k "
     "top_k_experts num_experts_per_token linear_num_key_heads linear_num_key_value_heads "
     "kv_n_heads swa_num_key_value_heads"),
    (HEAD_DIM, "head_dim d_kv d_head dim_head attention_head_dim v_head_dim qk_nope_head_dim "
     "linear_key_head_dim linear_value_head_dim linear_head_dim q_lora_rank kv_lora_rank "
     "o_lora_rank attention_head_size query_pre_attn_scalar global_head_dim swa_head_dim "
     "swa_v_head_dim index_head_dim mamba_d_state state_size ssm_state_size mamba_d_head "
     "hidden_size_per_layer_input"),
    (8, "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads"),
    (24, "sliding_window local_attention attention_window_size window_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
     "moe_shared_expert_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim "
     "t2u_decoder_ffn_dim adapter_rank mamba_chunk_size chunk_size"),
    (1, "n_group topk_group num_shared_experts n_shared_experts first_k_dense_replace n_groups "
     "mamba_n_groups mamba_ngroups num_mem_blocks"),
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input src_vocab_size "
     "tgt_vocab_size audio_vocab_size t2u_vocab_size char_vocab_size unpadded_vocab_size "
     "shape_vocab_size pronunciation_vocab_size"),
    (4096, "max_position_embeddings n_positions max_source_positions max_target_positions "
     "max_encoder_position_embeddings max_decoder_position_embeddings max_seq_len context_length "
     "n_ctx"),
    (0, "pad_token_id num_nextn_predict_layers"),
    (3, "bos_token_id decoder_start_token_id forced_bos_token_id"),
    (VOCAB - 1, "eos_token_id forced_eos_token_id"),
]  # fmt: skip
SIZES: dict[str, Any] = {name: size for size, names in _SAME for name in names.split()}

_SHARING = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_GEMMA4 = {**_SHARING, "global_head_dim": 32}
_ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_hidden_layers": 4,
}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}
_DOTS3 = {"per_layer_config": {}, "head_dim": 24}
_VIBE = {"num_filters": 4, "depths": [1] * 7}
# What a type needs besides. Gemma's layers share keys here, as in the small checkpoints; Zamba's
# attention comes twice.
FIELDS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"qk_head_dim": 24},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "ctrl": {"dff": HIDDEN},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": _SHARING,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minimax": {"sliding_window": None, "layer_types": ["full_attention", "linear_attention"]},
    "nemo_speechlm": {"word_timestamp_config": {"blank_token_id": 0}},
    "prophetnet": {"max_position_embeddings": 512},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [64, 64]},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _VIBE,
        "semantic_tokenizer_encoder_config": _VIBE,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}


def types(kind: str) -> list[str]:
    """All model types of a kind, `causal` or `seq2seq`."""
    names = {
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    return sorted(names[kind])


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes of the fields that a config has, and of the configs inside it."""
    fields = {**config.to_dict(), **dict.fromkeys(config.attribute_map)}
    small = {
        name: size
        for name, size in SIZES.items()
        if name in fields and config.attribute_map.get(name) not in SIZES
    }
    kinds = sorted(
        set(fields.get("layer_types") or ()), key=lambda kind: (kind == "full_attention", kind)
    )
    if len(kinds) > 1:
        small |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    elif (
        "sliding_window" in small
    ):  # of all layers: longer than what a pruned run reads, so that it prunes within
        small["sliding_window"] = 200
    if "kv_lora_rank" in small:  # a head has its own keys, of which this many numbers are rotated
        small |= {"num_key_value_heads": HEADS, "head_dim": SIZES["qk_rope_head_dim"]}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            small[name] = {"model_type": part.model_type, **_small(part)}
    return small


def _merge(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `fields`, also inside the configs inside."""
    merged = dict(fields)
    for name, value in more.items():
        inner = merged.get(name)
        merged[name] = (
            _merge(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
        )
    return merged


def tiny_config(model_type: str, kind: str = "causal") -> PreTrainedConfig:
    """A config of the type with two layers of a few heads."""
    fields = _merge(_small(AutoConfig.for_model(model_type)), FIELDS.get(model_type, {}))
    if kind == "causal" and "is_decoder" in AutoConfig.for_model(model_type).to_dict():
        fields["is_decoder"] = True
    return AutoConfig.for_model(model_type, **fields)
