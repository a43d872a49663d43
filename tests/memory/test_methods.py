"""What each PEFT method makes and keeps, against the trace of the real peft, and against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import NeedsPeftError
from peftplan.units import round512
from tests.memory.engines import BATCH, LLAMA, OFF, PLAIN, TOKENS, TOLERANCE, TRAINER, activation_bytes, phases

B, S, P = BATCH, TOKENS, 20
SHORT = {"trainer": "transformers", "gradient_checkpointing": False, "seq_len": 32}
"""Few tokens, so that what is as large as a weight decides the peak."""
VIRTUAL = {"num_virtual_tokens": P}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt-tuning", {**PLAIN, **VIRTUAL}),
        ("prompt-tuning", {**TRAINER, **VIRTUAL, "padding": True}),
        ("p-tuning", {**TRAINER, **VIRTUAL, "quant": "nf4"}),
        ("prefix-tuning", {**PLAIN, **VIRTUAL}),
        ("prefix-tuning", {**OFF, **VIRTUAL, "dtype": "fp32", "padding": True}),
        ("prefix-tuning", {**PLAIN, **VIRTUAL, "prefix_projection": True, "attn_implementation": "eager"}),
        ("ln-tuning", PLAIN),
        ("lora-fa", TRAINER),
        ("qlora", {**PLAIN, "gradient_accumulation_steps": 2}),
        ("lora", {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("lora", {**PLAIN, "lora_bias": True, "lora_dropout": 0.1, "rank_pattern": {"q_proj": 32}}),
        ("lora", {**TRAINER, "layers_to_transform": [1, 3], "target_modules": ["q_proj"]}),
        ("lora", {**TRAINER, "target_modules": ["q_proj", "embed_tokens"]}),
        ("lora", {**PLAIN, "trainable_token_indices": [1, 2, 3]}),
        ("vera", PLAIN),
        ("vera", {**TRAINER, "quant": "nf4"}),
        *((method, {**SHORT, "target_modules": "all-linear"}) for method in ("loha", "lokr", "fourierft")),
        ("lokr", {**TRAINER, "r": 16, "decompose_both": True, "quant": "int8"}),
    ],
)
def test_each_phase_peaks_where_the_trace_does(method: str, options: dict[str, Any]) -> None:
    """Load, forward, backward and step."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    analytic, traced = (phases(LLAMA, engine, method=method, **options) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_the_trained_copy_of_a_tied_module_is_a_weight_of_its_own(modules: list[str], *, tying: bool) -> None:
    """Which the head multiplies by, and which gets gradient and states; with `ensure_weight_tying` both read the embedding's."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    tied = {**LLAMA, "tie_word_embeddings": True, "vocab_size": 20_000}
    job = {**SHORT, "method": "lora", "modules_to_save": modules, "ensure_weight_tying": tying}
    if tying and modules == ["lm_head"]:
        with pytest.raises(NeedsPeftError, match="without its embedding"):
            phases(tied, "analytic", **job)
        return
    analytic, traced = (phases(tied, engine, **job) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ia3", {"target_modules": ["k_proj", "lm_head"], "feedforward_modules": []}),
        ("boft", {"target_modules": ["q_proj", "lm_head"]}),
        ("adalora", {"target_modules": ["q_proj", "lm_head"]}),
        ("lora-fa", {"target_modules": ["q_proj", "lm_head"], "r": 64}),
        ("lora-fa", {"target_modules": ["q_proj"], "r": 2048, "adapter_dtype": "bf16"}),
        ("lora-fa", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("vera", {"target_modules": ["q_proj", "lm_head"], "autocast": "bf16"}),
        ("dora", {"target_modules": ["q_proj", "lm_head"], "autocast": "bf16"}),
        ("prompt-tuning", {**VIRTUAL, "modules_to_save": ["embed_tokens"], "keep_gradients": True}),
    ],
)
def test_adapters_of_a_wide_head_peak_where_the_trace_does(method: str, options: dict[str, Any]) -> None:
    """Where logits, and what a step takes per parameter, decide the peaks."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    wide = {**LLAMA, "vocab_size": 20_000, "num_hidden_layers": 3}
    analytic, traced = (phases(wide, engine, method=method, **PLAIN, **options) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


def test_a_prefix_refuses_checkpointing_as_peft_does() -> None:
    """peft raises when the prompt encoder is made."""
    with pytest.raises(RefusedError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        phases(LLAMA, "analytic", method="prefix-tuning", **TRAINER, **VIRTUAL, gradient_checkpointing=True)


def _kept(method: str, depths: tuple[int, int], options: dict[str, Any]) -> int:
    """Bytes by which one more layer raises what is alive when the forward ends, weights and their likes left out."""
    at_depth = []
    for depth in depths:
        e = estimate({**LLAMA, "num_hidden_layers": depth}, method=method, engine="analytic", batch_size=B, seq_len=S, **options)
        assert e.peaks is not None
        at_depth.append(activation_bytes(e.peaks.ledgers["forward"]))
    return (at_depth[1] - at_depth[0]) // (depths[1] - depths[0])


def test_a_prompt_lengthens_every_sequence() -> None:
    """Prompt tuning with P tokens keeps in each layer what the same layer keeps for sequences of S + P."""
    assert _kept("prompt-tuning", (5, 6), {**PLAIN, **VIRTUAL}) == _frozen_layer(S + P)


def _frozen_layer(s: int) -> int:
    """What a frozen Llama layer keeps of a hidden state with a gradient: bf16, flash attention, a KV cache in the outputs."""
    n = B * s
    h, kv, i, heads = 256, 128, 768, 8
    norm = 4 * n * h + round512(4 * n)  # x in fp32, 1/rms of each row; a frozen weight keeps no normalized x
    attention = 2 * n * h + 2 * (2 * n * kv) + 2 * n * h + 4 * n * heads + 2 * 512  # q; cached k, v; output; logsumexp; rng
    mlp = 3 * (2 * n * i)  # gate before and after silu, up
    return 2 * norm + attention + mlp  # the sums of the residual keep nothing


def test_a_prefix_adds_only_longer_keys_and_values() -> None:
    """Prefix tuning keeps what a frozen layer keeps for S tokens, with another kernel, and P tokens more of keys and values.

    A mask that is not square rules out flash attention, so keys and values are repeated for all heads and the memory-efficient
    kernel keeps a bf16 copy of the mask, its rows of 276 padded to 280; the cache holds keys and values as they were.
    """
    n, keys, h, kv = B * S, B * (S + P), 256, 128
    frozen_less_flash = _frozen_layer(S) - (2 * (2 * n * kv) + 2 * 512)
    cache = 2 * (2 * keys * kv)
    repeated = 2 * (2 * keys * h)
    mask = 2 * B * S * 280
    assert _kept("prefix-tuning", (5, 6), {**PLAIN, **VIRTUAL}) == frozen_less_flash + cache + repeated + mask


def test_a_prefix_beside_the_load_balancing_loss_is_an_error_as_in_transformers() -> None:
    """peft lengthens the mask by the prefix; routers see the tokens alone. Without a mask, as in Trainer's batches, it runs."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    config = MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2, output_router_logits=True)
    model = peft.get_peft_model(MixtralForCausalLM(config), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    tokens = torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        model(input_ids=tokens, labels=tokens, attention_mask=tokens)
    options = {"method": "prefix-tuning", "gradient_checkpointing": False, **VIRTUAL}
    with pytest.raises(RefusedError, match="a mask that peft has lengthened"):
        estimate("mixtral-8x7b-v0.1", trainer="trl", **options)
    assert estimate("mixtral-8x7b-v0.1", trainer="trl", router_loss=False, **options).peaks is not None
    assert estimate("mixtral-8x7b-v0.1", router_loss=True, **options).peaks is not None
