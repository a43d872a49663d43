"""Virtual tokens: prefix tuning, prompt tuning and p-tuning.

P num_virtual_tokens, S num_transformer_submodules, L num_layers, d token_dim, e encoder_hidden_size.
Prefix tuning (Li and Liang 2021, arXiv 2101.00190): an embedding (P, 2·L·d) that is cut into keys and values; with a projection
an embedding (P, d) and two layers d → e → 2·L·d. Prompt tuning (Lester et al. 2021, arXiv 2104.08691): an embedding (P·S, d).
P-tuning (Liu et al. 2021, arXiv 2103.10385): that embedding behind an MLP d → e → e → d, or a bidirectional LSTM and an MLP.
Source: peft, `tuners/prefix_tuning/model.py`, `tuners/prompt_tuning/model.py`, `tuners/p_tuning/model.py`, and
`utils/other.py` (`_prepare_prompt_learning_config`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from peftplan.arch.modules import Architecture, PromptDims
from peftplan.errors import NeedsTraceError, RefusedError
from peftplan.methods.adaptation import Adaptation, AddedTensor, MethodConfig
from peftplan.methods.saved import saved_copies, saved_modules
from peftplan.methods.targets import Names
from peftplan.versions import named

Count = Annotated[int, Field(ge=1, le=2**24)]


class PromptLearningConfig(MethodConfig):
    """The fields that peft's virtual-token methods share; those left None are read from the model."""

    num_virtual_tokens: Count
    token_dim: Count | None = None
    num_transformer_submodules: Count | None = None
    num_attention_heads: Count | None = None
    num_layers: Count | None = None
    modules_to_save: Names = None


class PrefixTuningConfig(PromptLearningConfig):
    """peft's `PrefixTuningConfig`, less what changes no tensor."""

    prefix_projection: bool = False
    encoder_hidden_size: Count | None = None
    no_effect: ClassVar[frozenset[str]] = frozenset({"init_weights"})


class PromptTuningConfig(PromptLearningConfig):
    """peft's `PromptTuningConfig`, less what changes no tensor: how the embedding is initialized."""

    no_effect: ClassVar[frozenset[str]] = frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "encoder_hidden_size"}
    )


class PromptEncoderConfig(PromptLearningConfig):
    """peft's `PromptEncoderConfig` (p-tuning)."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: Count | None = None
    encoder_num_layers: Count = 2
    """Layers of the LSTM; the MLP always has three linear layers."""
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class _Dims(NamedTuple):
    """A model's sizes as peft resolves them."""

    num_layers: int
    token_dim: int
    submodules: int


def prefix_tuning(arch: Architecture, config: PrefixTuningConfig) -> Adaptation:
    """The prefix encoder that `get_peft_model` adds. It has key/value width if the model's config has `num_key_value_heads`."""
    dims = _dims(arch, config, kv=True)
    p, d, width = config.num_virtual_tokens, dims.token_dim, 2 * dims.num_layers * dims.token_dim
    if not config.prefix_projection:
        return _adaptation(arch, config, [_embedding(p, width)])
    e = config.encoder_hidden_size or d
    return _adaptation(arch, config, [_embedding(p, d), *_linear("transform.0", d, e), *_linear("transform.2", e, width)])


def prompt_tuning(arch: Architecture, config: PromptTuningConfig) -> Adaptation:
    """The prompt embedding that `get_peft_model` adds."""
    dims = _dims(arch, config)
    return _adaptation(arch, config, [_embedding(config.num_virtual_tokens * dims.submodules, dims.token_dim)])


def p_tuning(arch: Architecture, config: PromptEncoderConfig) -> Adaptation:
    """The prompt encoder that `get_peft_model` adds."""
    dims = _dims(arch, config)
    d, e = dims.token_dim, config.encoder_hidden_size or dims.token_dim
    embedding = _embedding(config.num_virtual_tokens * dims.submodules, d)
    if config.encoder_reparameterization_type == "MLP":
        head = [*_linear("mlp_head.0", d, e), *_linear("mlp_head.2", e, e), *_linear("mlp_head.4", e, d)]
        return _adaptation(arch, config, [embedding, *head])
    head = [*_linear("mlp_head.0", 2 * e, 2 * e), *_linear("mlp_head.2", 2 * e, d)]
    return _adaptation(arch, config, [embedding, *_lstm(d, e, config.encoder_num_layers), *head])


def _dims(arch: Architecture, config: PromptLearningConfig, *, kv: bool = False) -> _Dims:
    if arch.vocab_size == 0:
        raise RefusedError(f"method: peft finds no word embeddings in {arch.model_type}, which virtual tokens need")
    known = arch.prompt or PromptDims(0, 0, None)
    num_layers = config.num_layers or known.num_layers
    token_dim = config.token_dim or known.token_dim
    heads = config.num_attention_heads or known.num_attention_heads
    for name, value in (("num_layers", num_layers), ("token_dim", token_dim), ("num_attention_heads", heads)):
        if not value:
            raise RefusedError(f"{name}: peft does not find it in the config of {arch.model_type}; please specify `{name}`")
    if kv and heads and known.num_key_value_heads is not None:
        token_dim = (known.head_dim or token_dim // heads) * known.num_key_value_heads
    return _Dims(num_layers, token_dim, config.num_transformer_submodules or known.num_transformer_submodules)


def check_prefix(arch: Architecture, config: PrefixTuningConfig, *, batch_size: int) -> None:
    """Raise RefusedError if a prefix's keys do not fit the decoder's attention: peft or the model fails there too.

    NeedsTraceError where the peft config names other layers than the decoder's.
    """
    dims, known = _dims(arch, config, kv=True), arch.prompt
    heads = (known and known.num_key_value_heads) or config.num_attention_heads or (known and known.num_attention_heads) or 1
    p, head = config.num_virtual_tokens, dims.token_dim // heads
    if heads * head != dims.token_dim:
        shape, size = [batch_size, p, 2 * dims.num_layers, heads, head], batch_size * p * 2 * dims.num_layers * dims.token_dim
        raise RefusedError(f"{named('peft')} refuses it: RuntimeError: shape '{shape}' is invalid for input of size {size}")
    blocks = [block for block in arch.blocks if block.stack == "decoder"]
    if not all(block.attentions for block in blocks):
        raise NeedsTraceError("a prefix of layers without attention")
    if any((a.cached_heads or a.num_key_value_heads, a.head_dim) != (heads, head) for a in (b.attentions[0] for b in blocks)):
        raise RefusedError(
            f"{named('transformers')} refuses it: RuntimeError: a prefix of {heads} heads of {head} beside other keys; "
            "sizes must match"
        )
    if dims.num_layers != sum(len(block.layers) for block in blocks) or dims.submodules != (
        known and known.num_transformer_submodules
    ):
        raise NeedsTraceError("a prefix for other layers than the decoder's")


def _adaptation(arch: Architecture, config: PromptLearningConfig, encoder: list[AddedTensor]) -> Adaptation:
    return Adaptation(added=(*encoder, *saved_copies(arch, saved_modules(arch, config))))


def _embedding(rows: int, width: int) -> AddedTensor:
    return AddedTensor("prompt_encoder.embedding.weight", (rows, width), in_embedding=True)


def _linear(name: str, n_in: int, n_out: int) -> list[AddedTensor]:
    return [
        AddedTensor(f"prompt_encoder.{name}.weight", (n_out, n_in)),
        AddedTensor(f"prompt_encoder.{name}.bias", (n_out,)),
    ]


def _lstm(n_in: int, e: int, layers: int) -> list[AddedTensor]:
    """A bidirectional `nn.LSTM`: four gates of width e per direction; layers after the first read both directions (2·e)."""
    tensors = []
    for layer in range(layers):
        width = n_in if layer == 0 else 2 * e
        for direction in ("", "_reverse"):
            shapes = {"weight_ih": (4 * e, width), "weight_hh": (4 * e, e), "bias_ih": (4 * e,), "bias_hh": (4 * e,)}
            tensors += [
                AddedTensor(f"prompt_encoder.lstm_head.{part}_l{layer}{direction}", shape) for part, shape in shapes.items()
            ]
    return tensors
