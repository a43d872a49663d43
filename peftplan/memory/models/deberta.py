"""DeBERTa v2 and v3 (transformers, models/deberta_v2/modeling_deberta_v2.py): scores of content and of relative positions, and
v2's convolution of the embeddings, which joins what layer 0 returns.
"""

from __future__ import annotations

from functools import partial

from peftplan.arch.blocks import Attention, Block
from peftplan.depth.stack import run_stack, shared
from peftplan.errors import NeedsTraceError
from peftplan.ledger import Dim
from peftplan.memory.activations import activation
from peftplan.memory.calls import inputs
from peftplan.memory.convolution import convolution
from peftplan.memory.kinds import kinds_of
from peftplan.memory.model import Model
from peftplan.memory.models.bert import output
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Tensor

EMBEDDINGS = "deberta.embeddings"
CONVOLUTION = "deberta.encoder.conv"
LAYER = "deberta.encoder.layer.{}"


def deberta(model: Model) -> Tensor:
    """`DebertaV2Model.forward`, which holds the output of every layer until it returns."""
    model.can_cache = False
    f, block, s = model.tape, model.arch.blocks[0], model.seq
    if block.attentions[0].positions == "disentangled" and not block.attentions[0].relative:
        raise NeedsTraceError("DeBERTa's relative attention without pos_att_type")
    words = inputs(model)
    f.module = "deberta"
    ones = model.mask or model.batch.get("attention_mask") or f.new(("b", s), "fp32", "attention_mask")
    token_type_ids = f.new(("b", s), "int64", "token_type_ids")
    x = embeddings(model, words, token_type_ids, ones)
    del words
    f.module = "deberta.encoder"
    mask = f.new(("b", 1, s, s), ones.dtype, "attention_mask")
    distances = relative_positions(f, s, bucketed=block.attentions[0].bucketed) if block.attentions[0].relative else None
    sums: set[int] = set()
    positions = position_embeddings(model, sums) if distances is not None else None

    embedded = x if model.has(f"{CONVOLUTION}.conv") else None
    hidden_states: list[Tensor] = []
    returned = False
    checkpointed, kinds = model.running.checkpointing, kinds_of(model, "encoder")
    recomputed = model.reached("encoder", len(kinds)) if checkpointed else (False,) * len(kinds)

    def layer(number: int, x: Tensor, mask: Tensor) -> Tensor:
        if not returned and (model.running.hosted or not recomputed[number]):  # else its frame holds it
            hidden_states.append(x.detach())
        return encoder_layer(model, block, number, x, mask, distances, positions)

    if (
        len(set(recomputed)) > 1 or model.running.hosted
    ):  # how long a layer's output lives is the next layer's matter: each is run
        kinds = tuple(range(len(kinds)))
    holds = model.running.hosted or not all(recomputed)
    behind = None
    if embedded is not None:
        kinds, behind = (max(kinds) + 1, *kinds[1:]), partial(behind_layer, model, embedded, ones)
    x = run_stack(
        model, kinds, x, layer, name="layers", checkpointed=checkpointed, sums=sums, holds=holds, every=(mask,), behind=behind
    )
    returned = True
    del embedded, behind
    hidden_states.clear()  # which frames refer to
    del ones
    return x


def behind_layer(model: Model, embedded: Tensor, mask: Tensor, number: int, x: Tensor) -> Tensor:
    """What the encoder does with a layer's output: that of the first one meets the convolution."""
    return x if number else convolved(model, embedded, x, mask)


def convolved(model: Model, embedded: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
    """`ConvLayer.forward`: of the embeddings; padding is filled with zeros, and multiplied away behind the norm."""
    f, block = model.tape, model.arch.blocks[0]
    b, s, h = embedded.dims
    f.module = CONVOLUTION
    moved = ops.copied(f, embedded, "clone", (b, h, s))
    out = convolution(model, f"{CONVOLUTION}.conv", moved, (b, h, s))
    del moved
    f.module = CONVOLUTION
    out = ops.copied(f, out, "clone", (b, s, h))
    inverted = f.new((b, s), mask.dtype, "rsub")
    rmask = f.new((b, s), "bool", "to")
    del inverted
    out = masked_fill_(f, out, rmask)
    out = activation(f, ops.dropout(f, out, model.arch.dropout.hidden), block.convolution)
    joined = ops.add(f, residual, out)
    normed = model.layernorm(f"{CONVOLUTION}.LayerNorm", joined)
    f.module = CONVOLUTION
    normed = f.to(normed, joined.dtype)
    factor = f.new((b, s, 1), normed.dtype, "to") if mask.dtype != normed.dtype else mask.view((b, s, 1))
    return ops.mul(f, normed, factor)


def embeddings(model: Model, words: Tensor, token_type_ids: Tensor, mask: Tensor) -> Tensor:
    """`DebertaV2Embeddings.forward`: padding is multiplied away."""
    f, s = model.tape, model.seq
    f.module = EMBEDDINGS
    if model.has(f"{EMBEDDINGS}.position_embeddings"):
        positions = model.embedding(f"{EMBEDDINGS}.position_embeddings", (1, s))
        x = ops.add(f, words, positions)
    else:
        positions = f.new(words.dims, words.dtype, "zeros_like")
        x = words
    if model.has(f"{EMBEDDINGS}.token_type_embeddings"):
        token_types = model.embedding(f"{EMBEDDINGS}.token_type_embeddings", ("b", s), token_type_ids)
        f.module = EMBEDDINGS
        x = ops.add(f, x, token_types)
    if model.has(f"{EMBEDDINGS}.embed_proj"):
        x = model.linear(f"{EMBEDDINGS}.embed_proj", x)
    x = model.layernorm(f"{EMBEDDINGS}.LayerNorm", x)
    f.module = EMBEDDINGS
    factor = f.new(("b", s, 1), x.dtype, "to") if mask.dtype != x.dtype else mask.view(("b", s, 1))
    x = ops.mul(f, x, factor)
    return ops.dropout(f, x, model.arch.dropout.embedding)


def relative_positions(f: Tape, s: Dim, *, bucketed: bool) -> Tensor:
    """`build_relative_position`, and `make_log_bucket_position`, whose names live until it returns."""
    distances = f.new((1, s, s), "int64", "relative_pos")
    if not bucketed:
        return distances
    sign = f.new((s, s), "int64", "sign")
    below, above = f.new((s, s), "bool", "lt"), f.new((s, s), "bool", "gt")
    near = f.new((s, s), "bool", "bitwise_and")
    del below, above
    absolute = f.new((s, s), "int64", "abs")
    chosen = f.new((s, s), "int64", "where")
    del near, absolute
    logarithm = f.new((s, s), "fp32", "div")
    for op in ("log", "div", "mul", "ceil", "add"):
        logarithm = f.new((s, s), "fp32", op)
    few = f.new((s, s), "bool", "le")
    wide, signed = f.new((s, s), "fp32", "to"), f.new((s, s), "fp32", "mul")
    buckets = f.new((s, s), "fp32", "where")
    del few, wide, signed, sign, chosen, logarithm, distances
    out = f.new((1, s, s), "int64", "relative_pos")
    del buckets
    return out


def position_embeddings(model: Model, sums: set[int]) -> Tensor:
    """`get_rel_embedding`: the table itself, or its norm, which all layers read."""
    f = model.tape
    weight = model.part("deberta.encoder.rel_embeddings").weight
    assert weight is not None
    if f.modules is not None:
        f.modules.read("deberta.encoder", None, weight)
    table: Operand = weight
    if model.has("deberta.encoder.LayerNorm"):
        table = model.layernorm("deberta.encoder.LayerNorm", table)
    return shared(f, table, sums)


def encoder_layer(
    model: Model, block: Block, number: int, x: Tensor, mask: Tensor, distances: Tensor | None, positions: Tensor | None
) -> Tensor:
    """`DebertaV2Layer.forward`."""
    f = model.tape
    attention_output = attention(model, block, number, x, mask, distances, positions)
    inner = model.linear(f"{LAYER}.intermediate.dense", attention_output, number)
    f.module = f"{LAYER}.intermediate.intermediate_act_fn"
    inner = activation(f, inner, block.mlp.activation)
    return output(model, f"{LAYER}.output", number, inner, attention_output)


def attention(
    model: Model, block: Block, number: int, x: Tensor, mask: Tensor, distances: Tensor | None, positions: Tensor | None
) -> Tensor:
    """`DebertaV2Attention.forward`, which holds what self-attention returns."""
    out = Scores(model, block.attentions[0], number).attention(x, mask, distances, positions)
    return output(model, f"{LAYER}.attention.output", number, out, x)


def gather(f: Tape, x: Tensor, index: Tensor, dims: Dims) -> Tensor:
    """`gather`: keeps x and the index; backward scatters into zeros as large as x."""
    return f.new(dims, x.dtype, "gather", f.record(_gather_backward, (x,), x, index))


def _gather_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, g.dtype, "scatter_add")


def masked_fill(f: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`masked_fill`: keeps the mask."""
    return f.new(x.dims, x.dtype, "masked_fill", f.record(_masked_fill_backward, (x,), mask))


def _masked_fill_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "masked_fill")


def masked_fill_(f: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`masked_fill_`: writes into x, and keeps the mask."""
    return Tensor(x.storage, x.dims, x.dtype, f.record(_masked_fill_backward, (x,), mask))


def repeated(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`repeat`: a copy per sample; its gradient is their sum, that of one sample the gradient itself."""
    return f.new(dims, x.dtype, "repeat", f.record(_repeated_backward, (x,), x.dims))


def _repeated_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum") if f.several else g.view(saved[0])


class Scores:
    """`DisentangledSelfAttention` of one layer."""

    def __init__(self, model: Model, a: Attention, number: int) -> None:
        self.model = model
        self.a = a
        self.number = number
        self.name = f"{LAYER}.attention.self"

    def by_head(self, part: str, x: Tensor) -> Tensor:
        """A projection, and `transpose_for_scores`, which copies it."""
        f, a = self.model.tape, self.a
        b, s, _ = x.dims
        x = self.model.linear(f"{self.name}.{part}", x, self.number)
        f.module = self.name
        dims = (b, a.num_attention_heads, s, a.head_dim)
        return ops.copied(f, ops.heads(f, x, dims, clones=True), "clone")

    def attention(self, x: Tensor, mask: Tensor, distances: Tensor | None, positions: Tensor | None) -> Tensor:
        """`forward`."""
        model, f = self.model, self.model.tape
        q, k, v = (self.by_head(part, x) for part in ("query_proj", "key_proj", "value_proj"))
        dims = (*q.dims[:3], k.dims[2])
        scaled = ops.scale(f, k, "div")
        scores = products.matmul(f, q, scaled, dims, transposed=True)
        del scaled
        if distances is not None and positions is not None:
            positions = ops.dropout(f, positions, model.arch.dropout.hidden)
            bias = self.bias(q, k, distances, positions)
            scores = ops.add(f, scores, bias)
        _visible = f.new(mask.dims, "bool", "bool")
        scores = masked_fill(f, scores, f.new(mask.dims, "bool", "not"))
        weights = ops.softmax(f, scores, "fp32" if f.autocast else scores.dtype)
        weights = ops.dropout(f, weights, model.arch.dropout.attention)
        out = products.matmul(f, weights, v, q.dims)
        out = ops.copied(f, out, "clone")
        return out.view((q.dims[0], q.dims[2], self.a.num_attention_heads * self.a.head_dim))

    def bias(self, q: Tensor, k: Tensor, distances: Tensor, positions: Tensor) -> Tensor:
        """`disentangled_attention_bias`."""
        f, span = self.model.tape, positions.dims[0]
        table = positions.view((1, *positions.dims))  # `rel_embeddings[0 : att_span * 2, :]` is all of it: an alias
        shares = not any(self.model.has(f"{self.name}.{part}", self.number) for part in ("pos_key_proj", "pos_query_proj"))
        keys: Tensor | None = None
        queries: Tensor | None = None
        if shares:
            queries, keys = self.positions("query_proj", table, q), self.positions("key_proj", table, q)
        else:
            keys = self.positions("pos_key_proj", table, q) if "c2p" in self.a.relative else None
            queries = self.positions("pos_query_proj", table, q) if "p2c" in self.a.relative else None
        score: Tensor | None = None
        gathered = []
        for kind, content, against in (("c2p", q, keys), ("p2c", k, queries)):
            if kind not in self.a.relative or against is None:
                continue
            picked, index = self.picked(content, against, distances, span, from_keys=kind == "p2c")
            gathered.append((picked, index))
            score = added(f, ops.scale(f, picked, "div"), score)
        assert score is not None
        return score

    def positions(self, part: str, table: Tensor, q: Tensor) -> Tensor:
        """Positions projected, once per sample."""
        x = self.by_head(part, table)
        return repeated(self.model.tape, x, (q.dims[0], *x.dims[1:]))

    def picked(self, content: Tensor, against: Tensor, distances: Tensor, span: Dim, *, from_keys: bool) -> tuple[Tensor, Tensor]:
        """One kind of score: of every position in the table, then those of each pair; and the places of these in the table,
        which are made before the scores where keys are scored."""
        f, dims = self.model.tape, (*content.dims[:3], span)
        if from_keys:
            index = self.places(distances, negated=True)
            every = products.matmul(f, content, against, dims, transposed=True)
        else:
            every = products.matmul(f, content, against, dims, transposed=True)
            index = self.places(distances, negated=False)
        return gather(f, every, index, (*content.dims[:3], content.dims[2])), index

    def places(self, distances: Tensor, *, negated: bool) -> Tensor:
        """`clamp(distances + att_span, 0, att_span * 2 - 1)`."""
        f = self.model.tape
        _negative = f.new(distances.dims, "int64", "neg") if negated else None
        moved = f.new(distances.dims, "int64", "add")
        del _negative
        index = f.new(distances.dims, "int64", "clamp")
        del moved
        return index


def added(f: Tape, x: Tensor, score: Tensor | None) -> Tensor:
    """`score += x`: a new tensor from 0, then in place."""
    if score is None:
        return f.new(x.dims, x.dtype, "add", f.record(_pass, (x,)))
    return Tensor(score.storage, score.dims, score.dtype, f.record(_both, (score, x)))


def _pass(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


def _both(f: Tape, node: Node, saved: object, g: Tensor) -> tuple[Tensor, Tensor]:
    return g, g
