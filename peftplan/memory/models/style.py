"""What differs between decoders of the Llama shape, and what one of their layers reads when it is called."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from peftplan.arch.blocks import Block
from peftplan.job.kernel_facts import Lora
from peftplan.memory.attention import attend
from peftplan.memory.attention_layout import by_heads, gathered, product
from peftplan.memory.calls import behind, into_cache
from peftplan.memory.model import Model
from peftplan.memory.norms import rms
from peftplan.tape import ops
from peftplan.tape.rotary import rotary
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter, Tensor

if TYPE_CHECKING:
    from peftplan.memory.lora_products import Projection

Norm = Callable[[Model, str, Tensor, "int | None"], Tensor]
Rotation = Callable[[Tape, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""q, k, cosines and sines → q and k rotated, and what else lives until attention returns."""


class Call(NamedTuple):
    """One layer's call: what it reads besides its input. `tables`: cosines and sines, or what else its attention adds."""

    model: Model
    style: "Style"
    block: Block
    number: int
    tables: tuple[Tensor, ...]
    mask: Tensor | None

    @property
    def tape(self) -> Tape:
        """The tape."""
        return self.model.tape

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer of this layer."""
        return self.model.linear(f"{self.style.stack}.{name}", x, self.number)

    def adapted(self, kernel: Lora, names: Sequence[str]) -> "list[Projection] | None":
        """Projections of this layer that a LoRA kernel takes; None where it does not take them."""
        from peftplan.memory.lora_products import projections

        return projections(self.model, kernel, [f"{self.style.stack}.{name}" for name in names], self.number)

    @property
    def lora_dropout(self) -> float:
        """The dropout before an adapter."""
        from peftplan.methods.lora import LoraConfig

        return self.model.running.config_as(LoraConfig).lora_dropout

    def norm(self, name: str | None, x: Tensor) -> Tensor:
        """A norm of this layer; x itself where it has none."""
        return x if name is None else self.style.norm(self.model, f"{self.style.stack}.{name}", x, self.number)

    def module(self, name: str, x: Tensor, function: "Sublayer", *, by_name: bool = False) -> Tensor:
        """A module of this layer that has no parameters of its own."""
        path, reads = f"{self.style.stack}.{name}", self._read_by_kernels(name)
        return self.tape.call(path, self.number, (), x, lambda x: function(self, x), by_name=by_name, reads=reads)

    def _read_by_kernels(self, name: str) -> tuple[Parameter, ...]:
        """The parameters of modules inside that LoRA kernels read without calling these modules, which hooks do not see."""
        if self.tape.modules is None:
            return ()
        kernels = self.model.running.kernels
        of_attention = (kernels.lora_qkv, ("q_proj", "k_proj", "v_proj")), (kernels.lora_o, (self.style.output,))
        taken = {"self_attn": of_attention, "mlp": ((kernels.lora_mlp, ("gate_proj", "up_proj", "down_proj")),)}
        adapted = [
            self.adapted(kernel, [f"{name}.{part}" for part in parts]) or ()
            for kernel, parts in taken.get(name, ())
            if kernel is not None
        ]
        return tuple(x for ps in adapted for p in ps for x in p.parameters)

    def part(self, function: Callable[[Tensor], Tensor], x: Tensor, *, by_name: bool = False) -> Tensor:
        """A module of this layer, which may be a checkpoint within that of the layer."""
        if not self.model.running.checkpoints_parts:
            return function(x)
        return self.tape.checkpoint_within(function, x, by_name=by_name)

    def at(self, name: str = "") -> Tape:
        """The tape, for operations of the layer itself or of a module of it."""
        self.model.tape.module = f"{self.style.stack}.{name}" if name else self.style.stack
        return self.model.tape

    def dropout(self, x: Tensor, name: str | None = None) -> Tensor:
        """The dropout that follows sublayers, which may be a module of this name."""
        if name is not None:
            return self.module(name, x, Call.dropout)
        return ops.dropout(self.model.tape, x, self.model.arch.dropout.hidden)

    def behind(self, part: str, x: Tensor) -> Tensor:
        """The output of this layer's `attention` or `output`, through the adapter behind it."""
        return behind(self.model, f"{self.style.stack}.{part}_adapters", x, self.number)

    def cached(self, k: Tensor, v: Tensor, *, rotated: bool, at_once: bool = True) -> tuple[Tensor, Tensor]:
        """Keys and values as a cache copies them: their gradients come back head by head. `at_once`: see `ops.heads`."""
        if self.moved:
            k = k if rotated else ops.heads(self.tape, k, k.dims, clones=True, at_once=at_once)
            v = ops.heads(self.tape, v, v.dims, clones=True, at_once=at_once)
        return into_cache(self.model, k, v)

    @property
    def moved(self) -> bool:
        """Whether a cache copies keys and values, or joins them to those of a prefix."""
        return self.model.joins

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, rotated: bool, split: bool = False) -> Tensor:
        """Attention over keys and values that `cached` gave. `split`: parts of one projection, whose gradient joins theirs."""
        a, dropout = self.block.attentions[0], self.model.arch.dropout.attention
        if self.style.narrow_eager and self.model.running.attention == "eager":
            return narrow_eager(self, q, k, v, dropout, rotated=rotated)
        if a.softcap and not self.style.softcaps:
            a = a._replace(softcap=False)
        by_head, moved = self.style.by_head, self.moved or split
        if by_head and not moved and self.model.running.attention == "eager":  # rotation copies queries and keys alone
            v = ops.heads(self.tape, v, v.dims, clones=True, at_once=not self.style.views_last)
        out = attend(self.model, a, q, k, v, self.mask, dropout=dropout, rotated=rotated, by_head=by_head, moved=moved)
        return out if self.model.running.parts_of_row == 1 else ops.copied(self.tape, out, "all_to_all")


def narrow_eager(c: Call, q: Tensor, k: Tensor, v: Tensor, dropout: float, *, rotated: bool) -> Tensor:
    """GPT-2's and GPT-J's `eager_attention_forward`: softmax in the scores' dtype, its result in the values'."""
    f, model = c.tape, c.model
    q, k, v = by_heads(f, q, k, v, rotated=rotated, moved=c.moved)
    wide = (lambda y: f.to(y, "fp32")) if c.style.wide_scores else (lambda y: y)
    factors = wide(q), wide(k)  # arguments of `matmul`, which live until it returns beside autocast's casts
    weights = product(model, *factors, (*q.dims[:3], k.dims[2]), joined=(False, model.joins), transposed=True)
    del factors
    weights = ops.scale(f, weights)
    if c.mask is not None:
        weights = ops.add(f, weights, c.mask)
    scores = weights if c.style.wide_scores else None  # GPT-J's name holds them until the cast has been made
    weights = ops.softmax(f, weights, "fp32" if f.autocast else weights.dtype)
    weights = f.to(weights, v.dtype)
    del scores
    weights = ops.dropout(f, weights, dropout)
    model.layer_locals.append(weights)
    return gathered(model, product(model, weights, v, q.dims, joined=(True, model.joins)))


Sublayer = Callable[[Call, Tensor], Tensor]


def rotate_all(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of whole heads."""
    q = rotary(f, q, cos, sin)
    return q, rotary(f, k, cos, sin)


class Style(NamedTuple):
    """How a family differs from Llama: in its whole `layer`, its `attention`, its `mixture` of experts, or in parts of these.

    `norms` are those before and after attention, before and after the MLP. `qk_norm`: on the projection as it comes (`flat`), on
    its heads (`head`), on heads moved before the sequence (`moved`), on these once they are rotated (`rotated`), or on each head
    with a norm of its own (`each`). `norms_last`: q is normed once k and v are projected. `views_last`: heads are viewed once all
    three are there.
    `output` and `plain` are names: of attention's last projection, of the two matrices of an MLP without gate. `multiplied`: the
    embedding, and what a sublayer adds, are multiplied. `tables_by_window`: sliding layers have rotary tables of their own;
    `wide_tables`: in fp32, whatever the hidden states are. `hands_out_weights`: a layer's outputs, attention weights among them,
    live until the next layer's take their name. `softcaps`: attention heeds the config's cap. `by_head`: rotation leaves
    copies that lie head by head. `both_masks`: of full and of sliding attention, whatever layers there are. `narrow_eager`:
    eager attention is that of GPT-2, with `wide_scores` that of GPT-J. `mask_by_position`: layers take
    the mask by position, not by name. `checkpoints_parts`: under checkpointing parts of a layer are checkpoints, not the layer.
    `holds_projected`: names hold queries, keys and values as they were projected until attention returns.
    `drops_inside`: attention and the MLP drop out what they return; elsewhere the layer does. `dropouts`: names of the
    modules that drop out embeddings, what attention returns, and what the MLP does; None without such a module.
    """

    norm: Norm = rms
    norms: tuple[str | None, str | None, str | None, str | None] = ("input_layernorm", None, "post_attention_layernorm", None)
    rotate: Rotation = rotate_all
    layer: "Sublayer | None" = None
    attention: "Sublayer | None" = None
    mixture: "Sublayer | None" = None
    qk_norm: Literal["flat", "head", "moved", "rotated", "each"] = "head"
    qk_names: tuple[str, str] = ("q_norm", "k_norm")
    norms_last: bool = False
    views_last: bool = False
    output: str = "o_proj"
    plain: tuple[str, str] = ("mlp.c_fc", "mlp.c_proj")
    stack: str = "model.layers.{}"
    final_norm: str | None = "model.norm"
    multiplied: bool = False
    tables_by_window: bool = False
    wide_tables: bool = False
    hands_out_weights: bool = False
    softcaps: bool = True
    by_head: bool = False
    both_masks: bool = False
    narrow_eager: bool = False
    wide_scores: bool = False
    mask_by_position: bool = False
    checkpoints_parts: bool = False
    holds_projected: bool = False
    drops_inside: bool = False
    dropouts: tuple[str | None, str | None, str | None] = (None, None, None)
