"""A decoder whose layers torch compiles whole: each allocates what was recorded of one (`memory.models.recorded`).

A batch is one row without padding, as Unsloth makes it.
"""

from __future__ import annotations

from peftplan.arch.text_part import is_in_text_part
from peftplan.job.compiled_layers import MASK
from peftplan.job.kernel_facts import Norm
from peftplan.job.kernels import INT8_INT4
from peftplan.memory import fake_quantized, fused_layers
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import run_layers
from peftplan.memory.models.recorded import recorded_layer
from peftplan.memory.models.style import Style
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Parameter, Tensor

NORM = Norm("torch, inductor's RMSNorm", reuses_gradient=False)


def compiled_layers(model: Model) -> Tensor:
    """Embedding, rotary tables of each kind of attention, the recorded layers, and the final norm."""
    f = model.tape
    assert model.running.recorded is not None
    embedded = x = _beside_towers(model, _inputs(model))
    f.module = "model"
    if model.running.recorded.multiplied:
        x = ops.scale(f, x)
    else:
        del embedded
    states = [x]
    del x
    tables = positions_and_masks(model, states[0].dtype)
    of_stack = [m.name for m in model.arch.modules if m.layers is None and m.name.rpartition(".")[0] == model.arch.decoder]
    style = Style(layer=recorded_layer, norm=_norm, final_norm=next(name for name in of_stack if name.endswith("norm")))
    return run_layers(model, style, states, lambda _: tuple(tables), masks={})


def positions_and_masks(model: Model, dtype: str) -> list[Tensor]:
    """Rotary tables of each kind of attention, and masks, where the layers are handed any."""
    f = model.tape
    assert model.running.recorded is not None
    attentions = {b.attentions[0].window: b.attentions[0] for b in model.arch.blocks if b.attentions[0].positions == "rotary"}
    widths = [a.rotary_dim or a.head_dim for a in attentions.values()]
    if model.arch.model_type == "gpt_oss":  # one for both kinds of attention, as wide as half a head
        widths = [widths[0] // 2]
    f.module = "model.rotary_emb"
    rows = 1 if model.running.recorded.of_pairs or model.running.of_completions else "b"  # without positions in the batch
    unread = model.running.recorded.unread_mask
    dtype = "fp32" if model.running.recorded.wide_tables else dtype
    tables = [f.new((rows, "s", width), dtype, name) for width in widths for name in ("cos", "sin")]
    if unread or MASK in model.running.recorded.training:  # of each kind of attention: of a row's documents, or of rows apart
        f.module = "model"
        tables += [f.new(("b", "s", "s") if model.running.recorded.rows else ("b·s", "b·s"), "bool", "mask") for _ in attentions]
    return tables


def _inputs(model: Model) -> Tensor:
    """The embeddings; with a scheme that has them, of the fake-quantized table."""
    assert model.running.recorded is not None
    assert model.arch.input_embedding is not None
    if model.running.recorded.scheme != INT8_INT4:
        return inputs(model)
    f = model.tape
    f.module = model.arch.input_embedding
    table = fake_quantized.table(f, model.part(f.module), model.scales)
    return model.asking_gradient(ops.embedding(f, table, ("b", "s"), None))


def _beside_towers(model: Model, x: Tensor) -> Tensor:
    """The embeddings, among which the features of towers stand that train beside the text part: their weights have gradients."""
    outside = [p for p in model.parameters.all if p.trainable and not is_in_text_part(model.arch, p.name)]
    trained = [model.parameter(p, layer) for p in outside for layer in p.layers or (None,)]
    if not trained:
        return x
    return Tensor(x.storage, x.dims, x.dtype, model.tape.record(_to_towers, (x, *trained), trained))


def _to_towers(f: Tape, node: Node, saved: tuple[list[Parameter]], g: Tensor) -> Gradients:
    return [g, *(f.new(p.dims, p.dtype, "gradient") for p in saved[0])]


def _norm(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    f, weight = model.tape, model.part(name, layer).own_weight
    f.module = name
    assert model.running.recorded is not None
    normed = fused_layers.rms_norm(f, NORM, x, weight, dtype="fp32" if model.running.recorded.wide_norm else None)
    if model.running.recorded.first is None:
        return normed
    narrow = f.to(normed, model.running.dtype)
    return normed if model.running.holds_hidden_states else narrow  # GRPO reads the last of the hidden states (models/rl.py:2089)
