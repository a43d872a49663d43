"""What decoders of the Llama shape share: dimensions, the modules of one layer, sliding windows, blocks, and the backbone.

Sources: transformers, `models/<model_type>/modeling_<model_type>.py` and `configuration_<model_type>.py`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, classifier_dropout, probability, rotary_buffers
from peftplan.arch.modules import Buffer, Dropout, Module, PromptDims, embedding, linear, rmsnorm
from peftplan.errors import InputError, MissingError

LAYER_TYPES = ("full_attention", "sliding_attention")


class Dims(NamedTuple):
    """h hidden_size, i intermediate_size, v vocab_size, a query heads, kv key/value heads, d head_dim, and the layers.

    `shown_head_dim` is the `head_dim` of the config's `to_dict()`, None if it has none.
    """

    h: int
    i: int
    v: int
    a: int
    kv: int
    d: int
    layers: tuple[int, ...]
    shown_head_dim: int | None

    @property
    def attention(self) -> Attention:
        """Full causal attention with rotary positions."""
        return Attention(self.a, self.kv, self.d)

    @property
    def prompt(self) -> PromptDims:
        """The dimensions that peft reads."""
        return PromptDims(len(self.layers), self.h, self.a, num_key_value_heads=self.kv, head_dim=self.shown_head_dim)


def read_dims(
    c: Fields,
    *,
    kv: int | None = None,
    head_dim: int | None = None,
    shows_head_dim: bool = False,
    width: tuple[str, ...] = ("intermediate_size",),
) -> Dims:
    """The dimensions of a config.

    `kv`: the class's default number of key/value heads; None for one per query head.
    `head_dim`: its default head width; None for hidden_size / num_attention_heads.
    `shows_head_dim`: the class stores that quotient as its `head_dim`.
    `width`: names of the MLP's width, the first that is stated.
    """
    h, a = c.int("hidden_size"), c.int("num_attention_heads")
    kv = c.optional_int("num_key_value_heads", absent=kv) or a
    c.divide("num_attention_heads", a, "num_key_value_heads", kv)
    configured = c.optional_int("head_dim") or head_dim
    d = configured or c.divide("hidden_size", h, "num_attention_heads", a)
    return Dims(
        h=h,
        i=c.int(*width),
        v=c.int("vocab_size"),
        a=a,
        kv=kv,
        d=d,
        layers=c.layers("num_hidden_layers"),
        shown_head_dim=d if shows_head_dim else configured,
    )


def attention_modules(n: Dims, *, qkv_bias: bool = False, o_bias: bool = False) -> tuple[Module, ...]:
    """q, k, v and o."""
    return (
        linear("layers.{}.self_attn.q_proj", n.h, n.a * n.d, qkv_bias, n.layers),
        linear("layers.{}.self_attn.k_proj", n.h, n.kv * n.d, qkv_bias, n.layers),
        linear("layers.{}.self_attn.v_proj", n.h, n.kv * n.d, qkv_bias, n.layers),
        linear("layers.{}.self_attn.o_proj", n.a * n.d, n.h, o_bias, n.layers),
    )


def qk_norms(n: Dims) -> tuple[Module, ...]:
    """An RMSNorm over each head of q and k."""
    return tuple(rmsnorm(f"layers.{{}}.self_attn.{norm}", n.d, n.layers) for norm in ("q_norm", "k_norm"))


def gated_mlp(h: int, i: int, layers: tuple[int, ...], *, bias: bool = False, name: str = "layers.{}.mlp") -> tuple[Module, ...]:
    """gate and up from h to i, down from i to h."""
    return (
        linear(f"{name}.gate_proj", h, i, bias, layers),
        linear(f"{name}.up_proj", h, i, bias, layers),
        linear(f"{name}.down_proj", i, h, bias, layers),
    )


def fused_mlp(n: Dims) -> tuple[Module, ...]:
    """gate and up as one matrix, and down."""
    return (
        linear("layers.{}.mlp.gate_up_proj", n.h, 2 * n.i, layers=n.layers),
        linear("layers.{}.mlp.down_proj", n.i, n.h, layers=n.layers),
    )


def rmsnorms(n: Dims, *names: str) -> tuple[Module, ...]:
    """RMSNorms of a layer over the hidden size."""
    return tuple(rmsnorm(f"layers.{{}}.{name}", n.h, n.layers) for name in names)


def layer_windows(
    c: Fields, layers: tuple[int, ...], *, sliding: Callable[[int], bool], window: int | None
) -> tuple[int | None, ...]:
    """The sliding window of each layer, None for full attention: from `layer_types`, or from the class's rule `sliding`."""
    types = c.strs("layer_types", default=tuple(LAYER_TYPES[sliding(layer)] for layer in layers))
    if len(types) != len(layers) or not set(types) <= set(LAYER_TYPES):
        accepted = f"accepted: {len(layers)} entries (num_hidden_layers), each {' or '.join(LAYER_TYPES)}"
        raise InputError(f"{c.name}: layer_types", list(types), accepted)
    if window is None and "sliding_attention" in types:
        raise MissingError(f"{c.name}: sliding_window", "layers of type sliding_attention need it as a whole number")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def grouped_blocks(
    layers: tuple[int, ...], attentions: Iterable[Attention], mlps: Iterable[Mlp], like: Block
) -> tuple[Block, ...]:
    """One copy of the block `like` for each distinct pair of attention and MLP, in the order of their first layers."""
    groups: dict[tuple[Attention, Mlp], list[int]] = {}
    for layer, attention, mlp in zip(layers, attentions, mlps, strict=True):
        groups.setdefault((attention, mlp), []).append(layer)
    return tuple(
        like._replace(layers=tuple(group), attentions=(attention,), mlp=mlp) for (attention, mlp), group in groups.items()
    )


def windowed_blocks(block: Block, windows: Iterable[int | None]) -> tuple[Block, ...]:
    """The block split by the window of its layers."""
    attentions = [block.attentions[0]._replace(window=window) for window in windows]
    return grouped_blocks(block.layers, attentions, [block.mlp] * len(block.layers), block)


def first_met(modules: Iterable[Module]) -> tuple[Module, ...]:
    """Families of a layer in the order in which `named_modules()` first meets them.

    Those without layers are dropped; those that start at a later layer come after all that layer 0 has.
    """
    return tuple(sorted((m for m in modules if m.layers), key=lambda m: (m.layers or (0,))[0]))


def decoder_backbone(
    c: Fields,
    n: Dims,
    *,
    stem: str,
    layer: Iterable[Module],
    blocks: tuple[Block, ...],
    rotary_dim: int | None = None,
    norm: Module | None = None,
    dropout: Dropout | None = None,
) -> Backbone:
    """The bare model: token embedding, layers, final norm (an RMSNorm unless given), rotary tables of `rotary_dim` (or d).

    `dropout` is that of attention weights, and before a token classifier, unless given.
    """
    return Backbone(
        model_type=c.str("model_type"),
        stem=stem,
        prefix="model",
        modules=(embedding("embed_tokens", n.v, n.h), *layer, norm or rmsnorm("norm", n.h)),
        blocks=blocks if rotary_dim is None else tuple(_rotated(block, rotary_dim) for block in blocks),
        hidden_size=n.h,
        vocab_size=n.v,
        embedding="embed_tokens",
        buffers=rotary_buffers("rotary_emb", n.d if rotary_dim is None else rotary_dim),
        prompt=n.prompt,
        dropout=dropout or Dropout(attention=probability(c, "attention_dropout"), classifier=classifier_dropout(c)),
    )


def _rotated(block: Block, rotary_dim: int) -> Block:
    """The block with part of each head rotated."""
    return block._replace(attentions=tuple(a._replace(rotary_dim=rotary_dim) for a in block.attentions))


def rotary_by_layer_type(n: Dims, blocks: tuple[Block, ...]) -> tuple[Buffer, ...]:
    """Two fp32 tables, d / 2 entries each (rounded up), for each kind of attention that some layer has."""
    kinds = {"full_attention" if b.attentions[0].window is None else "sliding_attention" for b in blocks}
    half = (n.d + 1) // 2
    return tuple(
        Buffer(f"rotary_emb.{kind}_{part}", "fp32", (half,))
        for kind in sorted(kinds)
        for part in ("inv_freq", "original_inv_freq")
    )
