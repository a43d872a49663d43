"""Both engines on one small job, phase by phase, without the tails of blocks that only the trace's allocator has."""

from __future__ import annotations

from typing import Any

from peftplan import estimate
from peftplan.job.sources import load_config
from peftplan.ledger import Ledger

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
BATCH, TOKENS = 4, 256
TOLERANCE = 0.005
"""The lists of small integers (positions, padded labels) that only the trace has."""
PLAIN = {"trainer": "plain"}
TRAINER = {"trainer": "transformers"}
OFF = {"trainer": "transformers", "gradient_checkpointing": False}


LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def shallow(model: str, layers: int = 4) -> dict[str, Any]:
    """The config of a built-in model with so many layers."""
    config = load_config(model)
    for field in LAYER_FIELDS:
        if config.get(field) is not None:
            config[field] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    return config


def phases(config: dict[str, Any], engine: Any, **options: Any) -> dict[str, int]:
    """Bytes at the peak of each phase."""
    return by_phase(estimate(config, engine=engine, **{"batch_size": BATCH, "seq_len": TOKENS, **options}))


def by_phase(estimated: Any) -> dict[str, int]:
    """Bytes at the peak of each phase of an estimate."""
    peaks = estimated.peaks
    assert peaks is not None
    return {
        phase: sum(line.bytes() for line in ledger if line.place == "device" and line.name != "tails of unsplit blocks")
        for phase, ledger in peaks.ledgers.items()
    }


def activation_bytes(ledger: Ledger) -> int:
    """Bytes of activations, logits and temporaries, without the tails that the allocator adds to blocks."""
    categories = ("activations", "logits", "temporaries")
    return sum(line.bytes() for line in ledger if line.category in categories and not line.name.startswith("tails of"))


def kept_per_layer(config: dict[str, Any], **options: Any) -> int:
    """Bytes by which one more layer raises what is alive when the forward ends, without weights and tails of blocks."""
    at_depth = []
    for depth in (5, 6):
        sizes = {"batch_size": BATCH, "seq_len": TOKENS, **options}
        peaks = estimate({**config, "num_hidden_layers": depth}, **sizes).peaks
        assert peaks is not None
        at_depth.append(activation_bytes(peaks.ledgers["forward"]))
    return at_depth[1] - at_depth[0]
