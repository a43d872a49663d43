"""How the tests of the trace engine ask for a run: a tiny Llama, options of the command line, resolved as `estimate` does it."""

from __future__ import annotations

from typing import Any

from peftplan.job.resolving import resolved
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.setup import parse_setup
from peftplan.methods.adaptation import Adaptation
from peftplan.storage import parse_quant
from peftplan.trace.engine import Traced, trace
from peftplan.trace.fake import FakeOn

HIDDEN, MLP, HEADS, KV_HEADS, VOCAB = 256, 704, 8, 4, 1000
HEAD = HIDDEN // HEADS
KV = KV_HEADS * HEAD
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(layers: int = 2, **changes: Any) -> dict[str, Any]:
    """A Llama small enough for a test, with grouped queries."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        **changes,
    }


def lora(targets: list[str] = ALL_LINEAR, *, r: int = 8, **fields: Any) -> dict[str, Any]:
    """A LoRA adapter config."""
    return {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": list(targets), **fields}


def traced(
    config: dict[str, Any],
    peft_config: dict[str, Any] | Adaptation | None = None,
    *,
    quant: str | None = None,
    double_quant: bool = False,
    compute_dtype: str | None = None,
    device: tuple[int, int] | None = None,
    script: Script = NO_SCRIPT,
    fake_on: FakeOn = "auto",
    **options: Any,
) -> Traced:
    """Trace a causal language model."""
    stored = parse_quant(quant, double_quant=double_quant, compute_dtype=compute_dtype) if quant else None
    setup = resolved(parse_setup(options), quantized=stored is not None, supports_sdpa=True, use_cache=True)
    return trace(
        config,
        task_type="CAUSAL_LM",
        peft_config=peft_config,
        quant=stored,
        setup=setup,
        device=device,
        script=script,
        fake_on=fake_on,
    )
