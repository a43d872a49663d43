"""T5 and mT5 (transformers, models/t5/modeling_t5.py): relative positions from layer 0, which all layers of a stack add.

Under sdpa the positions are a mask, with a gradient where they train. `wo` stays fp32, so that beside fp16 weights the hidden
states are fp32 from the first feed-forward on.
"""

from __future__ import annotations

from functools import partial

from peftplan.arch.blocks import Attention, Block
from peftplan.depth.stack import SharedLeaf, run_stack, shared
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.errors import NeedsTraceError
from peftplan.ledger import Dim
from peftplan.memory.activations import activation, power
from peftplan.memory.attention import attend
from peftplan.memory.calls import into_cache
from peftplan.memory.kinds import kinds_of
from peftplan.memory.methods import virtual_tokens
from peftplan.memory.model import Model
from peftplan.memory.models.bart import block_of, decoder_mask, limited
from peftplan.memory.models.bert import bidirectional_mask
from peftplan.methods.adaptation import PROMPTED
from peftplan.tape import ops
from peftplan.tape.reentrant import Leaf
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def t5(model: Model) -> Tensor:
    """`T5Model.forward`: labels (or, for classification, the inputs) shifted right are what the decoder reads."""
    model.can_cache = model.arch.task_type == "SEQ_2_SEQ_LM"
    if not any(block.stack == "decoder" for block in model.arch.blocks):
        raise NeedsTraceError(f"the encoder of {model.arch.model_type} alone")
    prefix = "transformer." if model.has("transformer.shared") else ""
    if model.keys != model.seq:
        model.past = virtual_tokens.prefixed(model, t5_kinds(model, "decoder"))
    encoded = Stack(model, prefix, "encoder", set()).run(None, None)
    model.tape.module = ""
    ids = model.tape.new(("b", model.seq), "int64", "decoder_input_ids")
    out = Stack(model, prefix, "decoder", set()).run(ids, encoded)
    model.outputs.append(encoded)
    return out


def t5_kinds(model: Model, side: str) -> tuple[int, ...]:
    """The kinds of a stack's layers, of which the first makes the positions."""
    order: dict[tuple[int, bool], int] = {}
    return tuple(order.setdefault((kind, number == 0), len(order)) for number, kind in enumerate(kinds_of(model, side)))


def norm(model: Model, name: str, x: Tensor, number: int | None = None) -> Tensor:
    """`T5LayerNorm.forward`: x itself is multiplied, in fp32 by promotion; the mean is of a copy in fp32."""
    f = model.tape
    f.module = name
    weight = model.part(name, number).weight
    assert weight is not None
    squared = power(f, f.to(x, "fp32"))
    variance = mean(f, squared)
    del squared
    x = ops.mul(f, x, ops.keeps_output(f, ops.shift(f, variance), "rsqrt"))
    if weight.dtype in SIXTEEN_BITS:
        x = f.to(x, weight.dtype)
    return ops.mul(f, weight, x)


def mean(f: Tape, x: Tensor) -> Tensor:
    """`mean(-1, keepdim=True)`: keeps nothing; backward spreads and divides."""
    return f.new((*x.dims[:-1], 1), x.dtype, "mean", f.record(_mean_backward, (x,), x.dims))


def _mean_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "div")


def where(f: Tape, mask: Tensor, x: Tensor, dims: Dims) -> Tensor:
    """`torch.where(mask, x, number)`: keeps the mask; x may be broadcast."""
    return f.new(dims, x.dtype, "where", f.record(_where_backward, (x,), x.dims, mask))


def _where_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    out = f.new(g.dims, g.dtype, "where")
    return out if g.dims == saved[0] else f.new(saved[0], g.dtype, "sum")


def by_head(a: Attention, x: Tensor) -> Tensor:
    """`view(…).transpose(1, 2)`."""
    b, s, _ = x.dims
    return x.view((b, a.num_attention_heads, s, a.head_dim))


def clamped(f: Tape, x: Tensor) -> Tensor:
    """`clamp(x, -bound, bound)` of fp16 states, whose bound depends on `isinf(x)` (`abs`, then a comparison): keeps x."""
    if x.dtype != "fp16":
        return x
    size = f.new(x.dims, x.dtype, "abs")
    infinite = f.new(x.dims, "bool", "eq")
    del size, infinite
    return limited(f, x)


def relative_buckets(f: Tape, dims: Dims, *, signed: bool) -> Tensor:
    """`T5Attention._relative_position_bucket`, an operation at a time; `signed`: of both directions (an encoder's)."""
    if signed:
        above = f.new(dims, "bool", "gt")
        wide = f.new(dims, "int64", "to")
        del above
        halves = f.new(dims, "int64", "mul")
        del wide
        buckets = f.new(dims, "int64", "relative_position_bucket")
        del halves
        size = f.new(dims, "int64", "abs")
    else:
        zeros = f.new(dims, "int64", "zeros_like")
        least = f.new(dims, "int64", "minimum")
        del zeros
        size = f.new(dims, "int64", "neg")
        del least
    small = f.new(dims, "bool", "lt")
    large = f.new(dims, "fp32", "to")
    for op in ("div", "log", "div", "mul"):
        large = f.new(dims, "fp32", op)
    large = f.new(dims, "int64", "to")
    large = f.new(dims, "int64", "add")
    limit = f.new(dims, "int64", "full_like")
    large = f.new(dims, "int64", "minimum")
    del limit
    chosen = f.new(dims, "int64", "where")
    if not signed:
        buckets = f.new(dims, "int64", "relative_position_bucket")
    del chosen, size, small, large
    return buckets


class Stack:
    """`T5Stack.forward` of one side; `biases` are made by layer 0 and handed from layer to layer, as arguments and results."""

    def __init__(self, model: Model, prefix: str, side: str, sums: set[int]) -> None:
        self.model = model
        self.side = side
        self.name = f"{prefix}{side}"
        self.block: Block = block_of(model, side)
        self.biases: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor | None] = {}
        self.sums = sums

    @property
    def length(self) -> str:
        """The named size of this side's sequence."""
        return self.model.source if self.side == "encoder" else self.model.seq

    def run(self, ids: Tensor | None, encoded: Tensor | None) -> Tensor:
        """From token ids to the last hidden states."""
        model, f, p = self.model, self.model.tape, self.model.arch.dropout.embedding
        words = model.asking_gradient(model.embedding(f"{self.name}.embed_tokens", ("b", "s"), ids))
        if self.side == "encoder" and model.running.peft_type in PROMPTED:
            virtual_tokens.masked(model)
            words = virtual_tokens.prompted(model, words)
        f.module = self.name
        if self.side == "encoder":
            self.masks["own"] = bidirectional_mask(model, words.dtype)
        else:
            self.masks["own"] = decoder_mask(model, words.dtype)
            self.masks["cross"] = bidirectional_mask(model, words.dtype, cross=True)
        states = None if encoded is None else shared(f, encoded, self.sums)
        biases: list[Tensor] = []

        def every() -> tuple[object, ...]:
            own, cross = (*biases, None, None)[:2]
            return self.masks["own"], own, states, self.masks.get("cross"), cross

        x = run_stack(
            model,
            t5_kinds(model, self.side),
            ops.dropout(f, words, p),  # no name holds it
            partial(_layer_of, (model, self.name.removesuffix(self.side), self.side, self.sums)),
            name=self.side,
            checkpointed=model.running.checkpointing,
            sums=self.sums,
            every=every,
            outputs=biases,
        )
        x = norm(model, f"{self.name}.final_layer_norm", x)
        f.module = self.name
        return ops.dropout(f, x, p)

    def run_layer(self, number: int, x: Tensor, states: Tensor | None) -> Tensor:
        """The layer, whose biases are there or made."""
        own, *cross = self.block.attentions
        f = self.model.tape
        x = self.attended("0.SelfAttention", own, number, x, None)
        x = clamped(f, x)
        if cross:
            x = self.attended("1.EncDecAttention", cross[0], number, x, states)
            x = clamped(f, x)
            del self.model.layer_locals[:-1]  # one name for the weights of both
        x = self.feed_forward(number, x)
        return clamped(f, x)

    def attended(self, part: str, a: Attention, number: int, x: Tensor, states: Tensor | None) -> Tensor:
        """`T5LayerSelfAttention.forward`, `T5LayerCrossAttention.forward`."""
        model, f, at = self.model, self.model.tape, f"{self.name}.block.{{}}.layer.{part[0]}"
        normed = norm(model, f"{at}.layer_norm", x, number)
        out = self.attention(f"{self.name}.block.{{}}.layer.{part}", a, number, normed, states)
        f.module = at
        return ops.add(f, x, ops.dropout(f, out, model.arch.dropout.hidden))

    def attention(self, name: str, a: Attention, number: int, x: Tensor, states: Tensor | None) -> Tensor:
        """`T5Attention.forward`."""
        model, f = self.model, self.model.tape
        source = x if states is None else states
        q, k, v = (by_head(a, model.linear(f"{name}.{part}", y, number)) for part, y in (("q", x), ("k", source), ("v", source)))
        f.module = name
        prefixed = self.side == "decoder" and model.keys != model.seq
        if prefixed:  # before the cache joins them to those of the prefix
            k, v = (ops.heads(f, y, y.dims, clones=True) for y in (k, v))
        if prefixed:
            k, v = (virtual_tokens.continued if states is None else virtual_tokens.crossed)(model, k, v)
        elif self.side == "decoder":
            k, v = into_cache(model, k, v)
        bias = self.bias(name, a, number, q.dtype, cross=states is not None)
        mask = self.masks["own" if states is None else "cross"]
        dropout = model.arch.dropout.attention
        cached = (prefixed or None) if self.side == "decoder" else False
        if model.running.attention == "eager":
            out = attend(
                model, a, q, k, v, mask, dropout=dropout, rotated=False, wide=False, bias=bias, cached=cached, moved=prefixed
            )
        else:
            added = self.additive(a, bias, mask)  # lives beside autocast's cast of it until the kernel returns
            cast: Tensor = f.cast(added, f.autocast) if f.autocast else added
            out = attend(model, a, q, k, v, cast, dropout=dropout, rotated=False, cached=cached, moved=prefixed)
            del added, cast
        return model.linear(f"{name}.o", out, number)

    def additive(self, a: Attention, bias: Tensor, mask: Tensor | None) -> Tensor:
        """`create_position_bias_mask`: a copy per layer, of the positions and what the mask or causality hides."""
        f = self.model.tape
        dims = ("b" if mask is not None else bias.dims[0], *bias.dims[1:])
        hidden, permuted = mask, bias.storage is not None and bias.storage.number in f.permuted
        if mask is not None or a.causal:
            hidden = mask if mask is not None else f.new(dims[2:], "bool", "causal mask")
            bias = where(f, hidden, bias, dims)
        return ops.copied(f, bias, "clone", viewed=False) if permuted else bias

    def bias(self, name: str, a: Attention, number: int, dtype: str, *, cross: bool) -> Tensor:
        """The positions that layer 0 makes: an embedding of distances, or zeros for cross-attention.

        Under checkpointing the zeros ask for a gradient.
        """
        model, f, s = self.model, self.model.tape, self.length
        key = "cross" if cross else "own"
        if number:
            return self.biases[key]
        keys = model.source if cross else model.keys if self.side == "decoder" else s
        one: Dim = "b" if model.running.batch_size == 1 else 1  # a gradient of as many samples is not summed
        dims = (one, a.num_attention_heads, s, keys)
        if cross:
            positions = f.new(dims, dtype, "position_bias")
            if model.running.checkpointing and model.running.reentrant:
                positions.node = Leaf(dims, dtype)
            elif model.running.checkpointing:
                leaf = SharedLeaf("encoder_decoder_position_bias", dims, dtype, trainable=True)
                leaf.node = None  # refers to itself else
                leaf.source, leaf.sums = positions.detach(), self.sums
                positions.node = leaf
        else:
            table = name.replace("{}", "0") + ".relative_attention_bias"
            distances = f.new((s, keys), "int64", "relative_position")
            buckets = relative_buckets(f, (s, keys), signed=self.side == "encoder")
            positions = model.embedding(table, (s, keys), buckets).view(dims)
            if positions.storage is not None:
                f.permuted.add(positions.storage.number)
            del distances, buckets
            positions = shared(f, positions, self.sums)
        self.biases[key] = positions
        f.module = name
        return positions

    def feed_forward(self, number: int, x: Tensor) -> Tensor:
        """`T5LayerFF.forward`."""
        model, f = self.model, self.model.tape
        at = f"{self.name}.block.{{}}.layer.{len(self.block.attentions)}"
        normed = norm(model, f"{at}.layer_norm", x, number)
        dense = self.gated if self.block.mlp.variant == "gated" else self.plain
        normed = dense(f"{at}.DenseReluDense", number, normed)
        f.module = at
        return ops.add(f, x, ops.dropout(f, normed, model.arch.dropout.hidden))

    def gated(self, name: str, number: int, x: Tensor) -> Tensor:
        """`T5DenseGatedActDense.forward`."""
        model, f = self.model, self.model.tape
        gate = model.linear(f"{name}.wi_0", x, number)
        f.module = f"{name}.act"
        gate = activation(f, gate, self.block.mlp.activation)
        up = model.linear(f"{name}.wi_1", x, number)
        f.module = name
        x = self.widened(name, number, ops.mul(f, gate, up))
        return model.linear(f"{name}.wo", x, number)

    def plain(self, name: str, number: int, x: Tensor) -> Tensor:
        """`T5DenseActDense.forward`."""
        model, f = self.model, self.model.tape
        x = model.linear(f"{name}.wi", x, number)
        f.module = f"{name}.act"
        x = activation(f, x, self.block.mlp.activation)
        x = self.widened(name, number, x)
        return model.linear(f"{name}.wo", x, number)

    def widened(self, name: str, number: int, x: Tensor) -> Tensor:
        """Dropout, and a cast to the dtype that `wo` is kept in."""
        model, f = self.model, self.model.tape
        f.module = name
        x = ops.dropout(f, x, model.arch.dropout.activation)
        part = model.part(f"{name}.wo", number)
        if part.quant is None and part.weight is not None:
            x = f.to(x, part.weight.dtype)
        return x


def _layer_of(
    stack: tuple[Model, str, str, set[int]],
    number: int,
    x: Tensor,
    mask: Tensor | None,
    own: Tensor | None,
    states: Tensor | None,
    cross_mask: Tensor | None,
    cross: Tensor | None,
) -> tuple[Tensor, ...]:
    """A layer of a stack that holds nothing but this call's arguments; its output, and its positions."""
    called = Stack(*stack)
    called.masks = {"own": mask, "cross": cross_mask}
    called.biases = {key: bias for key, bias in (("own", own), ("cross", cross)) if bias is not None}
    x = called.run_layer(number, x, states)
    return (x, *(called.biases[key] for key in ("own", "cross") if key in called.biases))
