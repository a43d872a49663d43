"""Combinations of options that a random search found the two engines to disagree on."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan import estimate
from peftplan.errors import RefusedError
from tests.memory.engines import LLAMA, OFF, PLAIN, TOLERANCE, phases, shallow
from tests.memory.test_mixtures import V2 as DEEPSEEK

WIDE_MLP = {**LLAMA, "intermediate_size": 4096, "vocab_size": 100}
"""Its peak lies in an MLP, not in the logits."""
EAGER = {"attn_implementation": "eager"}
TIED = {**LLAMA, "tie_word_embeddings": True, "vocab_size": 20_000}
FALCON = {**LLAMA, "model_type": "falcon", "architectures": ["FalconForCausalLM"], "multi_query": True, "parallel_attn": True}
"""Its layers are no `nn.Linear`, so that bitsandbytes quantizes none."""
GPTJ = {"model_type": "gptj", "vocab_size": 1000, "n_layer": 3, "n_positions": 2048, "rotary_dim": 64}
MT5 = {"model_type": "mt5", "vocab_size": 1000, "num_layers": 2, "num_decoder_layers": 2, "d_ff": 2048, "d_kv": 64}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 20_000, "hidden_size": 256}
BERT |= {"num_attention_heads": 8, "intermediate_size": 512, "num_hidden_layers": 2, "type_vocab_size": 2}
BERT |= {"max_position_embeddings": 514, "pad_token_id": 1}
ROBERTA = {**BERT, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
BLOOM = {"model_type": "bloom", "hidden_size": 256, "n_head": 8, "n_layer": 3, "vocab_size": 100}
VIT = {"model_type": "vit", "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512, "num_hidden_layers": 3}
VIT |= {"architectures": ["ViTForImageClassification"], "image_size": 64, "patch_size": 8, "num_channels": 3}
QWEN2 = shallow("qwen2.5-0.5b", 2)
GPT2 = shallow("gpt2", 2)
MODERNBERT = {**shallow("modernbert-base", 2), "vocab_size": 51_000}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        # the outputs of the micro batch before are alive in the next one's forward, whether gradients stay or not
        (LLAMA, {**PLAIN, "gradient_accumulation_steps": 2, "keep_gradients": True, "keep_outputs": True}),
        # autocast casts the fp32 input and the dequantized weight again, in the product within
        (WIDE_MLP, {**OFF, "method": "qlora", "compute_dtype": "fp32", "gradient_checkpointing": True}),
        # Adagrad's constructor makes its states, and its step counters lie on the host
        (LLAMA, {**PLAIN, "optim": "adagrad", "r": 64}),
        # peft takes layers beside a list of names only
        (LLAMA, {**PLAIN, "layers_to_transform": (1, 3)}),
        # kbit preparation makes fp32 copies of what bitsandbytes left as it was
        (FALCON, {**PLAIN, "quant": "nf4", "target_modules": ["query_key_value"], "seq_len": 8}),
        # the new architecture broadcasts a single head by views, to as many heads as the fused kernel takes
        (FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1}, {**PLAIN, "target_modules": ["query_key_value"]}),
        (FALCON | {"new_decoder_architecture": True, "num_kv_heads": 8}, {**PLAIN, "target_modules": ["query_key_value"]}),
        # transformers repeats keys and values for a masked batch, so that the math kernel of an old card does not
        ({**LLAMA, "vocab_size": 100}, {**OFF, "method": "full", "gpu": "t4", "padding": True, "seq_len": 512}),
        # the trained rows live beside autocast's copy of their table
        (TIED, {**OFF, "target_modules": ["q_proj"], "trainable_token_indices": [1], "dtype": "fp32"}),
        # the head's adapter wraps the one whose rows train
        (TIED, {**PLAIN, "target_modules": ["lm_head"], "trainable_token_indices": [1]}),
        # a table that two modules share is copied for each, whichever of the two owns it
        (BERT, {**OFF, "target_modules": ["query"], "trainable_token_indices": [1]}),
        (ROBERTA, {**OFF, "target_modules": ["query"], "trainable_token_indices": [1]}),
        # the peak of a forward without logits lies in its activation function
        (BLOOM, {**PLAIN, "gradient_checkpointing": True, "logits_to_keep": 1}),
        # OFT rotates what a classifier reads, one row per picture
        (VIT, {**PLAIN, "method": "oft", "target_modules": ["query", "classifier"], "num_labels": 3}),
        # a checkpointed layer's first pass makes the masks that it does not keep
        (WIDE_MLP, {**PLAIN, "gradient_checkpointing": True, "lora_dropout": 0.1, "target_modules": ["down_proj"]}),
        # BOFT hands its output back in the base's dtype, which `rotate_half` joins: CUDA's autocast has no rule for `cat`
        (LLAMA, {**PLAIN, "method": "boft", "target_modules": ("q_proj",), "autocast": "fp16"}),
        # the square of `relu2` is a power, which CUDA's autocast runs in fp32
        (LLAMA | {"hidden_act": "relu2"}, {**PLAIN, "autocast": "bf16"}),
        # a prefix is in the base's dtype, what it is joined to in autocast's
        (LLAMA, {**PLAIN, "method": "prefix-tuning", "num_virtual_tokens": 8, "autocast": "fp16", "dtype": "fp32"}),
        (LLAMA, {**PLAIN, "method": "prefix-tuning", "num_virtual_tokens": 8, "autocast": "fp16"}),
        # the word stands for the parameters that hold the experts now
        (MIXTRAL, {**OFF, "target_modules": "mlp", "r": 64}),
        # the decoder reads a prefix for as many layers as the encoder has
        (shallow("bart-large", 12), {**OFF, "method": "prefix-tuning", "num_virtual_tokens": 8}),
        # axolotl leaves norms, embedding and head in fp32, under whatever name they share one table
        (TIED, {**OFF, "trainer": "axolotl", "method": "full", "dtype": "bf16", "autocast": "bf16"}),
        (GPT2, {**OFF, "trainer": "axolotl", "method": "full", "dtype": "bf16", "autocast": "bf16"}),
        # the math kernel makes no causal mask for an encoder, and one for each sample of a boolean one
        (MODERNBERT, {**PLAIN, "gpu": "t4", "gradient_checkpointing": True, "task_type": "SEQ_CLS", "seq_len": 512}),
    ],
)
def test_both_engines_agree(config: dict[str, Any], options: dict[str, Any]) -> None:
    ours, theirs = phases(config, "analytic", **options), phases(config, "trace", **options)
    assert ours == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in theirs.items()}


@pytest.mark.parametrize(
    ("config", "options", "why"),
    [
        (LLAMA, {"method": "lora-fa", "lora_bias": True, "target_modules": ["q_proj"]}, "TypeError"),
        # OFT takes latents of four dims for a picture
        (DEEPSEEK, {"method": "oft", "target_modules": ["kv_b_proj"]}, "is invalid"),
        # TRL reads the head's bias, which the wrapper of trained rows does not pass on
        (TIED, {"trainer": "trl", "target_modules": ["q_proj"], "trainable_token_indices": [1]}, "no attribute 'bias'"),
        (shallow("bloom-560m"), {"attn_implementation": "flash_attention_2"}, "no flash_attention_2"),
        # IA3's vectors make queries and keys fp32, and the bias of distances stays bf16
        (
            BLOOM,
            {"method": "ia3", "trainer": "trl", "quant": "int8", "dtype": "bf16", "autocast": "none", **EAGER},
            "must be the same",
        ),
        # int8's layers leave a trained bias in the fp16 of their input
        (QWEN2, {"trainer": "trl", "quant": "int8", "bias": "all", "dtype": "fp16", "autocast": "fp16"}, "unscale fp16"),
        (GPT2, {"trainer": "transformers", "quant": "int8", "bias": "all", "dtype": "fp32", "autocast": "fp16"}, "unscale fp16"),
    ],
)
def test_both_engines_refuse(config: dict[str, Any], options: dict[str, Any], why: str) -> None:
    job = {**PLAIN, "seq_len": 64, **options}
    try:
        reason = estimate(config, **job).not_modelled[0]
    except RefusedError as refused:
        reason = str(refused)
    assert why in reason
    with pytest.raises(RefusedError, match=why):
        estimate(config, engine="trace", **job)


def test_the_gradients_of_casts_for_flash_attention_are_freed_in_the_traces_order() -> None:
    """transformers casts queries, keys and values in this order, autocast its arguments from the last one on."""
    pytest.importorskip("transformers")
    config = {**LLAMA, "hidden_size": 1024, "num_key_value_heads": 2, "intermediate_size": 3072}
    job = {"method": "qlora", "trainer": "plain", "autocast": "bf16", "attn_implementation": "flash_attention_2"}
    ours, traced = (
        estimate(config, engine=engine, seq_len=1024, batch_size=1, gradient_checkpointing=True, **job).peaks
        for engine in ("analytic", "trace")
    )
    assert ours is not None
    assert traced is not None
    assert ours.reserved == traced.reserved


def test_biases_of_int8_turn_fp32_where_their_input_is_fp32() -> None:
    """A norm's result is fp32 under autocast: biases that were loaded in fp16 train, and their gradients are unscaled."""
    job: dict[str, Any] = {"quant": "int8", "dtype": "fp16", "autocast": "fp16", "kbit_prepare": False}
    ours, traced = (
        estimate(GPT2, engine=engine, seq_len=64, bias="lora_only", target_modules=["c_attn"], **job).peaks
        for engine in ("analytic", "trace")
    )
    assert ours is not None
    assert traced is not None
    assert ours.by_phase == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.by_phase.items()}


def test_starcoder2_drops_out_before_attention_returns() -> None:
    """Queries, keys and values live until attention has dropped out what it returns."""
    config = {**LLAMA, "model_type": "starcoder2", "num_hidden_layers": 3, "vocab_size": 88_220, "intermediate_size": 15_072}
    config |= {
        "hidden_size": 3712,
        "num_attention_heads": 29,
        "num_key_value_heads": 29,
        "architectures": ["Starcoder2ForCausalLM"],
    }
    job = {"gradient_checkpointing": True, "every_n_layers": 2, "attn_implementation": "eager", "padding": True}
    job |= {"method": "dora", "lora_dropout": 0.05, "target_modules": "mlp", "seq_len": 2048, "batch_size": 2}
    ours, traced = (estimate(config, engine=engine, **job).peaks for engine in ("analytic", "trace"))
    assert ours is not None
    assert traced is not None
    assert ours.reserved == pytest.approx(traced.reserved, rel=0.001)


@pytest.mark.parametrize(
    ("config", "job"),
    [
        # arguments of `torch.matmul(query.to(torch.float32), …)` live until it returns, beside autocast's casts of them
        (
            {**GPTJ, "n_embd": 1024, "n_head": 8},
            {"trainer": "qlora-paper", "dtype": "fp16", "autocast": "fp16", "attn_implementation": "eager", "method": "lora"},
        ),
        # an encoder has no cache that would join keys and values: the math kernel copies them (a T4 has no flash attention)
        ({**MT5, "d_model": 1024, "num_heads": 16}, {**PLAIN, "gpu": "t4", "padding": True, "method": "lora"}),
    ],
)
def test_what_attention_holds_while_it_multiplies(config: dict[str, Any], job: dict[str, Any]) -> None:
    ours, traced = (estimate(config, engine=engine, seq_len=1000, batch_size=5, **job).peaks for engine in ("analytic", "trace"))
    assert ours is not None
    assert traced is not None
    assert ours.reserved == pytest.approx(traced.reserved, rel=0.001)
    for phase in ("forward", "backward", "step"):
        assert ours.by_phase[phase] == pytest.approx(traced.by_phase[phase], rel=0.0002), phase


@pytest.mark.parametrize("engine", ["analytic", "trace"])
@pytest.mark.parametrize(("module", "name"), [("k_proj", "key"), ("v_proj", "value")])
def test_flash_attn_takes_no_keys_of_another_dtype(engine: Any, module: str, name: str) -> None:
    """LoHa's result is in fp32, as its input from autocast's layer norm; transformers casts only where queries are fp32."""
    stablelm = {**LLAMA, "model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}
    options: dict[str, Any] = {"method": "loha", "dtype": "bf16", "autocast": "bf16", "attn_implementation": "flash_attention_2"}
    with pytest.raises(RefusedError, match=f"query and {name} must have the same dtype"):
        estimate(stablelm, engine=engine, target_modules=[module], **options)
    estimate(stablelm, engine=engine, target_modules=["q_proj", module], **options)


def test_a_gradient_by_blocks_replaces_one_of_all_features() -> None:
    """OFT rotates `encoder_hidden_states` by blocks, and so does the gradient come that the encoder's last layer gets; a copied
    layer frees the gradient of the layer behind it, and its own input."""
    options: Any = {"method": "oft", "trainer": "plain", "batch_size": 4, "seq_len": 1024}
    analytic, traced = (estimate(shallow("bart-base", 4), engine=engine, **options).peaks for engine in ("analytic", "trace"))
    assert analytic is not None
    assert traced is not None
    assert analytic.by_phase["step"] == pytest.approx(traced.by_phase["step"], rel=0.001)
