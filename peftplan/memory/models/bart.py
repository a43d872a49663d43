"""BART and Whisper (transformers, models/{bart,whisper}/modeling_*.py): norms after each part, or before.

Encoder and decoder run in one graph: what each decoder layer's cross-attention gives the encoder's output is summed there. Left
out: LayerDrop, which skips layers by chance.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block
from peftplan.depth.stack import run_stack, shared
from peftplan.errors import NeedsTraceError
from peftplan.memory.activations import activation
from peftplan.memory.attention import attend
from peftplan.memory.calls import into_cache
from peftplan.memory.convolution import convolution
from peftplan.memory.kinds import kinds_of
from peftplan.memory.masks import seen_keys
from peftplan.memory.methods import virtual_tokens
from peftplan.memory.model import Model
from peftplan.memory.models.bert import bidirectional_mask
from peftplan.methods.adaptation import PROMPTED
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor


def bart(model: Model) -> Tensor:
    """`BartModel.forward`: labels (or, for classification, the inputs) shifted right are what the decoder reads."""
    if model.arch.task_type == "CAUSAL_LM":
        raise NeedsTraceError(f"{model.arch.model_type} as a causal language model")
    model.can_cache = is_whisper(model)
    ids = model.tape.new(("b", model.seq), "int64", "decoder_input_ids")
    if model.keys != model.seq:
        model.past = virtual_tokens.prefixed(model)
    encoded = whisper_encoder(model) if is_whisper(model) else bart_encoder(model)
    out = decoder(model, ids, encoded)
    model.outputs.append(encoded)
    return out


def is_whisper(model: Model) -> bool:
    """Whether the model is Whisper, not BART."""
    return model.arch.model_type == "whisper"


def block_of(model: Model, stack: str) -> Block:
    """The block of one stack."""
    return next(block for block in model.arch.blocks if block.stack == stack)


def words_of(model: Model, name: str, ids: Tensor | None) -> Tensor:
    """`embed_tokens`, which BART multiplies by a scale, even where it is 1."""
    return model.asking_gradient(model.embedding(f"{name}.embed_tokens", ("b", model.seq), ids, scaled=not is_whisper(model)))


def encoder_words(model: Model, name: str) -> Tensor:
    """What the encoder reads, behind virtual tokens if the method puts some there."""
    if model.running.peft_type not in PROMPTED:
        return words_of(model, name, None)
    words = words_of(model, name, None)
    virtual_tokens.masked(model)
    return virtual_tokens.prompted(model, words)


def bart_encoder(model: Model) -> Tensor:
    """`BartEncoder.forward`."""
    f, name = model.tape, "model.encoder"
    words = encoder_words(model, name)
    rows = ("b", model.source)
    positions = model.embedding(f"{name}.embed_positions", rows, f.new(rows, "int64", "position_ids"))
    f.module = name
    x = ops.add(f, words, positions)
    x = model.layernorm(f"{name}.layernorm_embedding", x)
    f.module = name
    x = ops.dropout(f, x, model.arch.dropout.embedding)
    mask = bidirectional_mask(model, words.dtype)
    states = [x]  # no name holds it
    del x
    return run_encoder(model, states, mask)


def whisper_encoder(model: Model) -> Tensor:
    """`WhisperEncoder.forward`: two convolutions over mel frames, the second with stride 2."""
    f, name, h = model.tape, "model.encoder", model.arch.hidden_size
    sound = model.batch["input_features"]
    positions = model.part(f"{name}.embed_positions").weight
    assert positions is not None
    count = positions.dims[0]
    x = convolution(model, f"{name}.conv1", sound, ("b", h, sound.dims[2]))
    x = model.asking_gradient(x)
    f.module = name
    inputs_embeds = ops.keeps_input(f, x, "gelu")
    del x
    x = convolution(model, f"{name}.conv2", inputs_embeds, ("b", h, count))
    f.module = name
    x = ops.keeps_input(f, x, "gelu").view(("b", count, h))
    del inputs_embeds
    all_positions = f.new((count,), "int64", "positions")
    inputs_embeds = x
    f.module = name
    x = ops.add(f, inputs_embeds, model.embedding(f"{name}.embed_positions", (count,), all_positions))
    x = ops.dropout(f, x, model.arch.dropout.embedding)
    states = [x]  # no name holds it
    del x
    x = run_encoder(model, states, None)
    return model.layernorm(f"{name}.layer_norm", x)


def run_encoder(model: Model, states: list[Tensor], mask: Tensor | None) -> Tensor:
    """The encoder's layers; `states` holds the only reference to their input."""
    block, kinds = block_of(model, "encoder"), kinds_of(model, "encoder")

    def layer(number: int, x: Tensor, mask: Tensor | None) -> Tensor:
        return encoder_layer(model, block, number, x, mask)

    checkpointed = model.running.checkpointing
    return run_stack(model, kinds, states, layer, name="encoder", checkpointed=checkpointed, every=(mask,))


def decoder(model: Model, ids: Tensor, encoded: Tensor) -> Tensor:
    """`BartDecoder.forward`, `WhisperDecoder.forward`."""
    f, s, name, whisper = model.tape, model.seq, "model.decoder", is_whisper(model)
    words = words_of(model, name, ids)
    rows = ("b", s) if whisper else (1, s)
    position_ids = f.new(rows, "int64", "position_ids")
    f.module = name
    mask = None if whisper else decoder_mask(model, words.dtype)
    cross_mask = None if whisper else bidirectional_mask(model, words.dtype, cross=True)
    positions = model.embedding(f"{name}.embed_positions", rows, position_ids)
    f.module = name
    x = ops.add(f, words, positions)
    if not whisper:
        x = model.layernorm(f"{name}.layernorm_embedding", x)
    x = ops.dropout(f, x, model.arch.dropout.embedding)
    mask = decoder_mask(model, words.dtype) if whisper else mask
    states = [x]  # no name holds it
    del x
    block = block_of(model, "decoder")

    sums: set[int] = set()
    encoded = shared(f, encoded, sums)

    def layer(number: int, x: Tensor, mask: Tensor | None, encoded: Tensor) -> Tensor:
        return decoder_layer(model, block, number, x, encoded, mask, cross_mask)

    kinds, checkpointed = kinds_of(model, "decoder"), model.running.checkpointing
    every = (mask, encoded)
    x = run_stack(model, kinds, states, layer, name="decoder", checkpointed=checkpointed, sums=sums, every=every)
    return model.layernorm(f"{name}.layer_norm", x) if whisper else x


def decoder_mask(model: Model, dtype: str) -> Tensor | None:
    """`create_causal_mask` of targets without padding: none but for eager or a prefix, to which BART adds a mask of ones."""
    if model.running.attention != "eager" and model.keys == model.seq:
        return None
    seen = seen_keys(model, windowed=False, padded=not is_whisper(model))
    if model.running.attention != "eager":
        return seen
    return model.tape.new(("b", 1, model.seq, model.keys), dtype, "causal mask")


def encoder_layer(model: Model, block: Block, number: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """`BartEncoderLayer.forward`, `WhisperEncoderLayer.forward`, which clamps what is fp16."""
    name = "model.encoder.layers.{}"
    x = attended(model, block, block.attentions[0], f"{name}.self_attn", number, x, None, mask)
    x = feed_forward(model, block, name, number, x)
    return limited(model.tape, x, permuted=True) if is_whisper(model) and x.dtype == "fp16" else x


def limited(f: Tape, x: Tensor, *, permuted: bool = False) -> Tensor:
    """`clamp(x, -bound, bound)`: keeps x. `permuted`: x lies as the convolutions left it, and so does its gradient."""
    return f.new(x.dims, x.dtype, "clamp", f.record(_limited_backward, (x,), x, permuted))


def _limited_backward(f: Tape, node: Node, saved: tuple[Tensor, bool], g: Tensor) -> Tensor:
    above, below = (f.new(g.dims, "bool", op) for op in ("ge", "le"))
    out = f.new(g.dims, g.dtype, "where")
    if saved[1] and out.storage is not None:
        f.permuted.add(out.storage.number)
    del above, below
    return out


def decoder_layer(
    model: Model, block: Block, number: int, x: Tensor, encoded: Tensor, mask: Tensor | None, cross_mask: Tensor | None
) -> Tensor:
    """`BartDecoderLayer.forward`, `WhisperDecoderLayer.forward`."""
    name = "model.decoder.layers.{}"
    own, cross = block.attentions
    x = attended(model, block, own, f"{name}.self_attn", number, x, None, mask)
    x = attended(model, block, cross, f"{name}.encoder_attn", number, x, encoded, cross_mask)
    return feed_forward(model, block, name, number, x)


def attended(
    model: Model, block: Block, a: Attention, name: str, number: int, x: Tensor, states: Tensor | None, mask: Tensor | None
) -> Tensor:
    """One attention of a layer with its residual and its norm."""
    f = model.tape
    residual = x
    if block.norm_position == "pre":
        x = model.layernorm(f"{name}_layer_norm", x, number)
    x = attention(model, block, a, name, number, x, states, mask)
    del model.layer_locals[:-1]  # one name for the weights of both
    f.module = name.rpartition(".")[0]
    x = ops.dropout(f, x, model.arch.dropout.hidden)
    x = ops.add(f, residual, x)
    return model.layernorm(f"{name}_layer_norm", x, number) if block.norm_position == "post" else x


def feed_forward(model: Model, block: Block, name: str, number: int, x: Tensor) -> Tensor:
    """`fc1` and `fc2` with their residual and norm."""
    f, p = model.tape, model.arch.dropout
    residual = x
    if block.norm_position == "pre":
        x = model.layernorm(f"{name}.final_layer_norm", x, number)
    wide = model.linear(f"{name}.fc1", x, number)
    f.module = f"{name}.activation_fn"
    x = activation(f, wide, block.mlp.activation)
    del wide
    f.module = name
    x = ops.dropout(f, x, p.activation)
    x = model.linear(f"{name}.fc2", x, number)
    f.module = name
    x = ops.dropout(f, x, p.hidden)
    x = ops.add(f, residual, x)
    return model.layernorm(f"{name}.final_layer_norm", x, number) if block.norm_position == "post" else x


def attention(
    model: Model, block: Block, a: Attention, name: str, number: int, x: Tensor, states: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`BartAttention.forward`; Whisper scales queries itself, and copies all three head by head, as a cache would."""
    f, heads, d = model.tape, a.num_attention_heads, a.head_dim
    whisper = is_whisper(model)
    q = model.linear(f"{name}.q_proj", x, number)
    f.module = name
    if whisper:
        q = ops.scale(f, q)
    prefixed = model.keys != model.seq and block.stack == "decoder"
    q = split_heads(model, q, heads, d)
    source = x if states is None else states
    k = split_heads(model, model.linear(f"{name}.k_proj", source, number), heads, d, moved=prefixed)
    v = split_heads(model, model.linear(f"{name}.v_proj", source, number), heads, d, moved=prefixed)
    f.module = name
    if whisper and block.stack == "decoder":
        k, v = into_cache(model, k, v)
    elif prefixed:
        k, v = (virtual_tokens.continued if states is None else virtual_tokens.crossed)(model, k, v)
    out = attend(
        model,
        a,
        q,
        k,
        v,
        mask,
        dropout=model.arch.dropout.attention,
        rotated=False,
        wide=False,
        by_head=whisper,
        cached=whisper or prefixed or None,
        moved=prefixed,
    )
    return model.linear(f"{name}.out_proj", out, number)


def split_heads(model: Model, x: Tensor, heads: int, d: int, *, moved: bool = False) -> Tensor:
    """`view(…).transpose(1, 2)`, and `contiguous()` where the class calls it. `moved`: a cache joins it to a prefix."""
    b, s, _ = x.dims
    split = ops.heads(model.tape, x, (b, heads, s, d), clones=moved or is_whisper(model))
    return ops.copied(model.tape, split, "clone") if is_whisper(model) else split
