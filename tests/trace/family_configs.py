"""Tiny configs of every kind of model: model type, class, task and what LoRA adapts in it."""

from __future__ import annotations

from typing import Any, NamedTuple

Config = dict[str, Any]


class Family(NamedTuple):
    """One tiny model. `qlora_skip`: modules that QLoRA has to leave unquantized to train; None where it cannot train at all."""

    config: Config
    model_class: str
    task: str | None
    targets: str | list[str] = "all-linear"
    qlora_skip: tuple[str, ...] | None = ()
    checkpointing: bool = True


PLAIN: Config = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA: Config = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
GPT2: Config = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 200}
LOCAL_EXPERTS: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: Config = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MLA: Config = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
SSM: Config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 200}
SCAN: Config = {"head_dim": 16, "n_groups": 2, "chunk_size": 16}
BART: Config = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 200, "max_position_embeddings": 64, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5: Config = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 200,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip
VIT: Config = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_channels": 3,
}  # fmt: skip
SOUND: Config = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 30,
    "pad_token_id": 0, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "conv_dim": [32] * 7,
}  # fmt: skip
MLLAMA: Config = {
    "text_config": {"model_type": "mllama_text_model", **GQA, "cross_attention_layers": [1],
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "vision_config": {"model_type": "mllama_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                      "num_global_layers": 1, "attention_heads": 4, "image_size": 32, "patch_size": 8, "vision_output_dim": 128,
                      "intermediate_layers_indices": [0], "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]]},
}  # fmt: skip

QV, QUERY = ["q_proj", "v_proj"], ["query", "value"]


def _causal(model_type: str, stem: str, config: Config, targets: str | list[str] = "all-linear", **more: Any) -> Family:
    return Family({"model_type": model_type, **config}, f"{stem}ForCausalLM", "CAUSAL_LM", targets, **more)


FAMILIES: dict[str, Family] = {
    "llama": _causal("llama", "Llama", GQA),
    "qwen3": _causal("qwen3", "Qwen3", GQA),
    "gemma2": _causal("gemma2", "Gemma2", GQA),
    "gemma3_text": _causal("gemma3_text", "Gemma3", GQA),
    "olmo2": _causal("olmo2", "Olmo2", GQA),
    "glm": _causal("glm", "Glm", GQA),
    "glm4": _causal("glm4", "Glm4", GQA),
    "phi": _causal("phi", "Phi", PLAIN),
    "gpt2": Family({"model_type": "gpt2", **GPT2}, "GPT2LMHeadModel", "CAUSAL_LM", ["c_attn"]),
    "gpt_neox": _causal("gpt_neox", "GPTNeoX", PLAIN),
    "bloom": _causal("bloom", "Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200}),
    "falcon": _causal("falcon", "Falcon", PLAIN),
    "opt": _causal("opt", "OPT", {**PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "mixtral": _causal("mixtral", "Mixtral", {**GQA, **LOCAL_EXPERTS}, QV),
    "qwen3_moe": _causal("qwen3_moe", "Qwen3Moe", {**GQA, **EXPERTS}, QV),
    "gpt_oss": _causal("gpt_oss", "GptOss", {**GQA, **LOCAL_EXPERTS}, QV),
    "deepseek_v2": _causal("deepseek_v2", "DeepseekV2", {**PLAIN, **MLA}, ["q_a_proj", "o_proj"]),
    "deepseek_v3": _causal("deepseek_v3", "DeepseekV3", {**PLAIN, **MLA}, ["q_a_proj", "o_proj"]),
    "ministral3": _causal("ministral3", "Ministral3", GQA),
    "seed_oss": _causal("seed_oss", "SeedOss", GQA),
    "hunyuan_v1_dense": _causal("hunyuan_v1_dense", "HunYuanDenseV1", GQA),
    "exaone4": _causal("exaone4", "Exaone4", {**GQA, "sliding_window": 16, "sliding_window_pattern": 2}),
    "arcee": _causal("arcee", "Arcee", GQA),
    "apertus": _causal("apertus", "Apertus", GQA),
    "lfm2": _causal("lfm2", "Lfm2", {**GQA, "layer_types": ["conv", "full_attention"]}),
    "falcon_h1": _causal("falcon_h1", "FalconH1", {**GQA, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 16, "mamba_chunk_size": 16}, ["in_proj", "q_proj"]),
    "nemotron_h": _causal("nemotron_h", "NemotronH", {**GQA, "hybrid_override_pattern": "M*", "mamba_num_heads": 8,
        "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 16}, ["in_proj", "q_proj"]),
    "ernie4_5": _causal("ernie4_5", "Ernie4_5", GQA),
    "glm4_moe": _causal("glm4_moe", "Glm4Moe", {**GQA, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
        "moe_intermediate_size": 32}, QV),
    "glm4_moe_lite": _causal("glm4_moe_lite", "Glm4MoeLite", {**PLAIN, **MLA}, ["q_a_proj", "o_proj"]),
    "mamba": _causal("mamba", "Mamba", {**SSM, "state_size": 4}, ["in_proj", "x_proj"], qlora_skip=("dt_proj", "lm_head")),
    "mamba2": _causal("mamba2", "Mamba2", {**SSM, **SCAN, "state_size": 16, "num_heads": 8}, ["in_proj"]),
    "jamba": _causal("jamba", "Jamba", {**GQA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4}, ["q_proj", "in_proj"]),
    "qwen3_next": _causal("qwen3_next", "Qwen3Next", {**GQA, **EXPERTS, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32}, ["q_proj", "o_proj"]),
    "llama-classifier": Family({"model_type": "llama", **GQA, "num_labels": 3}, "LlamaForSequenceClassification", "SEQ_CLS",
        qlora_skip=("score",)),
    "bert": Family({"model_type": "bert", **PLAIN}, "BertForMaskedLM", "MASKED_LM", QUERY),
    "roberta": Family({"model_type": "roberta", **PLAIN}, "RobertaForSequenceClassification", "SEQ_CLS", QUERY,
        qlora_skip=("classifier",)),
    "electra": Family({"model_type": "electra", **PLAIN, "embedding_size": 64}, "ElectraForTokenClassification", "TOKEN_CLS",
        QUERY, qlora_skip=("classifier",)),
    "xlm-roberta": Family({"model_type": "xlm-roberta", **PLAIN}, "XLMRobertaForQuestionAnswering", "QUESTION_ANS", QUERY,
        qlora_skip=("qa_outputs",)),
    "distilbert": Family({"model_type": "distilbert", "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 200,
        "max_position_embeddings": 64}, "DistilBertForMaskedLM", "MASKED_LM", ["q_lin"]),
    "deberta-v2": Family({"model_type": "deberta-v2", **PLAIN, "type_vocab_size": 0, "relative_attention": True,
        "position_buckets": 16, "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        "DebertaV2ForTokenClassification", "TOKEN_CLS", ["query_proj"], qlora_skip=("classifier",)),
    "modernbert": Family({"model_type": "modernbert", **PLAIN, "local_attention": 16}, "ModernBertForMaskedLM", "MASKED_LM",
        ["Wqkv"]),
    "albert": Family({"model_type": "albert", **PLAIN, "embedding_size": 32}, "AlbertForSequenceClassification", "SEQ_CLS",
        ["query"], qlora_skip=("classifier",), checkpointing=False),
    "t5": Family({"model_type": "t5", **T5}, "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ["q", "v"]),
    "bart": Family({"model_type": "bart", **BART}, "BartForConditionalGeneration", "SEQ_2_SEQ_LM", QV),
    "bart-classifier": Family({"model_type": "bart", **BART}, "BartForSequenceClassification", "SEQ_CLS", QV,
        qlora_skip=("classification_head",)),
    "marian": Family({"model_type": "marian", **BART}, "MarianMTModel", "SEQ_2_SEQ_LM", QV),
    "whisper": Family({"model_type": "whisper", **BART, "max_source_positions": 20, "max_target_positions": 32,
        "num_mel_bins": 16, "begin_suppress_tokens": None}, "WhisperForConditionalGeneration", None, QV),
    "wav2vec2": Family({"model_type": "wav2vec2", **SOUND}, "Wav2Vec2ForCTC", None, QV),
    "hubert": Family({"model_type": "hubert", **SOUND}, "HubertForSequenceClassification", None, QV),
    "ast": Family({"model_type": "audio-spectrogram-transformer", **VIT, "max_length": 40, "num_mel_bins": 16},
        "ASTForAudioClassification", None, QV),
    "vit": Family({"model_type": "vit", **VIT}, "ViTForImageClassification", None, QV),
    "dinov2": Family({"model_type": "dinov2", **VIT, "mlp_ratio": 2}, "Dinov2ForImageClassification", None, QV),
    "swin": Family({"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
        "num_heads": [2, 2], "window_size": 4}, "SwinForImageClassification", None, ["query", "q_proj"], checkpointing=False),
    "convnext": Family({"model_type": "convnext", "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        "ConvNextForImageClassification", None, ["pwconv1"], checkpointing=False),
    "videomae": Family({"model_type": "videomae", **VIT, "num_frames": 4}, "VideoMAEForVideoClassification", None, QUERY),
    "clip": Family({"model_type": "clip", "projection_dim": 32, "text_config": {**PLAIN, "projection_dim": 32},
        "vision_config": {**VIT, "projection_dim": 32}}, "CLIPModel", None, QV),
    "llava": Family({"model_type": "llava", "text_config": {"model_type": "llama", **GQA}, "image_token_index": 150,
        "vision_config": {"model_type": "clip_vision_model", **VIT}}, "LlavaForConditionalGeneration", "CAUSAL_LM", QV),
    "paligemma": Family({"model_type": "paligemma", "text_config": {"model_type": "gemma", **GQA}, "image_token_index": 150,
        "vision_config": {"model_type": "siglip_vision_model", **VIT, "projection_dim": 64}, "projection_dim": 64},
        "PaliGemmaForConditionalGeneration", "CAUSAL_LM", QV),
    "gemma3": Family({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **GQA}, "mm_tokens_per_image": 4,
        "image_token_index": 150, "vision_config": {"model_type": "siglip_vision_model", **VIT}},
        "Gemma3ForConditionalGeneration", "CAUSAL_LM", QV),
    "mllama": Family({"model_type": "mllama", **MLLAMA}, "MllamaForConditionalGeneration", "CAUSAL_LM", QV),
    "qwen2_vl": Family({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text", **GQA, "rope_parameters": {
        "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}, "vision_config": {"depth": 2,
        "embed_dim": 64, "num_heads": 4, "hidden_size": 64, "patch_size": 8}},
        "Qwen2VLForConditionalGeneration", "CAUSAL_LM", QV),
}  # fmt: skip
