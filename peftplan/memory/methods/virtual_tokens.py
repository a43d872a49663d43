"""Virtual tokens: what prompt tuning, p-tuning and prefix tuning make before the base model runs, and keep while it does.

p virtual tokens, d width of a token, L layers, g key/value heads, e head size. Source: peft, peft_model.py
(`PeftModelForCausalLM.forward`, `get_prompt`), tuners/{prompt_tuning,p_tuning,prefix_tuning}/model.py; transformers,
cache_utils.py (`DynamicCache`). Left out: p-tuning's LSTM.
"""

from __future__ import annotations

from itertools import pairwise

from peftplan.depth.sections import sections_of
from peftplan.errors import NeedsTraceError
from peftplan.ledger import Dim
from peftplan.memory.kinds import kinds_of
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import cat, sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor

MLP = ("mlp_head.0", "mlp_head.2", "mlp_head.4")
PROJECTION = ("transform.0", "transform.2")


def masked(model: Model) -> None:
    """Ones for the virtual tokens before the batch's mask, in fp32; the wrapper's forward holds them until it returns."""
    f, p = model.tape, model.virtual_tokens
    if "attention_mask" in model.batch:
        f.module = ""
        ones = f.new(("b", p), "fp32", "ones")
        model.mask = f.new(("b", "k"), "fp32", "attention_mask")
        model.call_locals += [ones, model.mask]


def prompted(model: Model, words: Tensor) -> Tensor:
    """The embeddings of virtual tokens before those of the batch's, and labels that ignore them where each token has one."""
    f, p = model.tape, model.virtual_tokens
    f.module = ""
    if model.arch.task_type == "CAUSAL_LM":
        model.call_locals += [f.new(("b", p), "int64", "labels of virtual tokens"), f.new(("b", "k"), "int64", "labels")]
    if isinstance(words.node, Node):  # a leaf, read here alone
        words.node.at_once = True
    prompts = f.to(_prompt(model), words.dtype)
    model.call_locals.append(prompts)
    f.module = ""
    first = sliced(f, prompts, ("b", p, words.dims[-1])) if model.translates else prompts
    x = cat(f, (first, words), ("b", "k", words.dims[-1]))
    model.call_locals.append(x)
    return x


def _prompt(model: Model) -> Tensor:
    """The prompt encoder's output for one sequence, repeated for each; an encoder-decoder's has tokens for both stacks."""
    f = model.tape
    table = model.part("prompt_encoder.embedding").weight
    assert table is not None
    p = table.dims[0]
    ids = f.new(("b", p), "int64", "prompt_tokens")
    x = model.embedding("prompt_encoder.embedding", (1, p), ids)
    if model.running.peft_type == "P_TUNING":
        x = _sequential(model, x, _layers(model, MLP), "relu")
    f.module = ""
    return f.new(("b", *x.dims[1:]), x.dtype, "repeat", f.record(_repeat_backward, (x,), x.dims))


def _layers(model: Model, names: tuple[str, ...]) -> tuple[str, ...]:
    if model.has("prompt_encoder.lstm_head"):
        raise NeedsTraceError("an LSTM before virtual tokens")
    return tuple(f"prompt_encoder.{name}" for name in names)


def _repeat_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


def _sequential(model: Model, x: Tensor, names: tuple[str, ...], activation: str) -> Tensor:
    """Linear layers with an activation between each two."""
    _embedded = x  # a name of the encoder's forward
    for name, following in pairwise((*names, "")):
        x = model.linear(name, x)
        if following:
            x = ops.activation(model.tape, x, activation)
    return x


def prefixed(model: Model, kinds: tuple[int, ...] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the virtual tokens of each layer that `run_stack` runs, in its order: copies that a cache made.

    `kinds` of the decoder's layers, where they are not `kinds_of`.
    """
    f, p = model.tape, model.virtual_tokens
    a = next(block for block in model.arch.blocks if block.stack == "decoder").attentions[0]
    f.module = ""
    ids = f.new(("b", p), "int64", "prompt_tokens")
    x = model.embedding("prompt_encoder.embedding", ("b", p), ids)
    if model.has("prompt_encoder.transform.0"):
        x = _sequential(model, x, _layers(model, PROJECTION), "tanh")
    del ids
    assert model.arch.input_embedding is not None
    base = model.part(model.arch.input_embedding).weight
    assert base is not None
    f.module = ""
    x = f.to(x, base.dtype)
    kinds = kinds or kinds_of(model)
    kinds = tuple(range(len(kinds))) if model.every_layer else kinds
    sections, _ = sections_of(kinds, summing=model.translates)
    extra = len(kinds) - len(sections)
    layers = len(kinds)
    x = Tensor(x.storage, x.dims, x.dtype, f.record(_viewed_backward, (x,), x.dims))
    parts = 2
    if model.translates:  # the same for cross-attention, which then takes none
        parts = 4
        x = f.new((*x.dims[:-1], _doubled(x.dims[-1])), x.dtype, "cat", f.record(_twice_backward, (x,), x.dims))
    one = ("b", a.cached_heads or a.num_key_value_heads, p, a.head_dim)
    node = f.record(_split_backward, (x,), (parts, *one), (parts * layers, *one), extra)
    pairs = []
    for number in range(len(sections)):
        pair = f.record(_unbind_backward, (Tensor(x.storage, (parts, *one), x.dtype, node, number),), (2, *one), (parts, *one))
        k, v = (ops.cached(f, Tensor(x.storage, one, x.dtype, pair, side)) for side in range(2))
        pairs.append((k, v))
    if extra:
        model.copied_past = f.many(one, x.dtype, "cat", 2 * extra)
    return pairs


def _doubled(dim: Dim) -> int:
    assert isinstance(dim, int)
    return 2 * dim


def _twice_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    """The gradients of both are views; their sum is new."""
    return f.new(saved[0], g.dtype, "add")


def _viewed_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    """`view` behind which `permute` came: its gradient in the order of the encoder's output is a copy."""
    return f.new(saved[0], g.dtype, "clone")


def _split_backward(f: Tape, node: Node, saved: tuple[Dims, Dims, int], *grads: Tensor | None) -> Tensor:
    """`split`: the gradients of all layers side by side."""
    pair, every, copies = saved
    dtype = next(g.dtype for g in grads if g is not None)
    others = f.many(pair, dtype, "slice_backward", copies) if copies else None
    joined = f.new(every, dtype, "cat")
    del others, grads
    return joined


def _unbind_backward(f: Tape, node: Node, saved: tuple[Dims, Dims], *grads: Tensor | None) -> Tensor:
    """The gradients of a layer's keys and values, stacked; the slice of them that the split takes is one more."""
    dtype = next(g.dtype for g in grads if g is not None)
    stacked = f.new(saved[0], dtype, "stack")
    del grads
    out = f.new(saved[1], stacked.dtype, "slice_backward")
    del stacked
    return out


def continued(model: Model, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's keys and values behind those of the virtual tokens: a cache that the outputs hold, whatever `use_cache` says."""
    past_k, past_v = model.past.pop(0)
    k = _continued(model.tape, past_k, k)
    del past_k
    v = _continued(model.tape, past_v, v)
    del past_v
    model.kept.append((k.detach(), v.detach()))
    return k, v


def crossed(model: Model, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-attention's keys and values, which the cache of a prefix copies and the outputs hold."""
    k, v = ops.cached(model.tape, k), ops.cached(model.tape, v)
    model.kept.append((k.detach(), v.detach()))
    return k, v


def _continued(f: Tape, past: Tensor, x: Tensor) -> Tensor:
    dims: Dims = (*x.dims[:2], "k", x.dims[3])
    return f.new(dims, ops.promoted(past.dtype, x.dtype), "cat", f.record(_continued_backward, (past, x), past.dims, x.dims))


def _continued_backward(f: Tape, node: Node, saved: tuple[Dims, Dims], g: Tensor) -> Gradients:
    """Both gradients are views; that of the virtual tokens' part waits, and the whole with it, until all layers are done."""
    assert g.storage is not None
    f.lasting.add(g.storage.number)
    return tuple(Tensor(g.storage, dims, g.dtype) for dims in saved)
