"""Blocks that a policy writes behind the anchors of a document, the reward that reads them, and the loss.

b documents, s tokens of a document and of all blocks behind it, n of them in blocks, h hidden size, v vocabulary. A rollout is a
row for each document; those of adapted layers run one after another (each row apart, which needs less in backward where there are
several documents), and their graphs are kept until backward; a whole model runs all at once:

    writing     eager attention over all that is written, with a dense mask and without a KV cache: logits in 16 bits and in fp32,
                beside those in fp32, and two tensors of the anchors' logits, of the step before
    a rollout   the backbone, and of n tokens (of s beside a cross entropy), 256 at a time, log-probabilities in fp32; or logits
                in fp32 of all s tokens
    the reward  all rollouts at once without adapter, or by a copy in 16 bits: the hidden states of every layer, the logits of
                every token, and what accelerate returns of both in fp32; then those of three layers side by side, whitened

Source: axolotl 0.19.0, core/trainers/ebft/strided.py (`_generate_strided_blocks`, `compute_loss`, `_compute_block_rewards`),
rewards.py (`whiten_embeddings_batched`); accelerate, utils/operations.py (`convert_outputs_to_fp32`); what torch holds of the
arguments of flex attention was rehearsed. Left out: the workspace of cuSOLVER's SVD of 3h × rollouts numbers, where the
reward's logits and hidden states are gone, so that the peak holds unless it is larger than they are; the masks of flex attention
in blocks of 128; numbers of whole rows.
"""

from __future__ import annotations

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.heads import logits_of
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.pair_logits import gathered_log_probs
from peftplan.memory.timeline import EMPTIED
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

TOKENS_AT_ONCE = 256
"""Of which logits are made (strided.py:678)."""
FEATURES = 3
"""Layers whose hidden states a reward compares, by default at a quarter, half and three quarters of the depth."""


def loss_of_blocks(model: Model, *, block: int, rollouts: int, accumulates: bool, scores_all: bool) -> Tensor:
    """`AxolotlStridedEBFTTrainer.compute_loss`. `accumulates`: whether a step has several micro batches. `scores_all`: whether
    log-probabilities are made of the tokens of documents too.

    A backward leaves the arguments of the flex attention that it recomputes last, and of adapted layers the leaf of its graph and
    its gradient. They are replaced in every forward; here they stay where they are first.
    """
    f, each = model.tape, model.adapter is not None
    scored = (model.running.seq_len if scores_all else model.running.logits_to_keep or 1) - 1
    leaf = [model.arch.hidden_size or 0] if each else []
    if model.micro_batch == accumulates:
        _pin(model, "arguments of flex attention", _arguments(model) + leaf)
    _written = [f.new((rollouts if each else 1, "b", "s"), "int64", name) for name in ("full_sequences", "position_ids")]
    with f.no_grad():
        _write(model, block, rollouts if each else 1)
    f.mark(EMPTIED)
    if each:
        outputs = None
        if model.micro_batch == 0:
            _pin(model, "leaf of a rollout", leaf)
        per_token = _each_rollout(model, rollouts, scored)
    else:
        outputs = _all_logits(model)  # a local variable holds them
        per_token = _scored(model, outputs, scored)
        f.module = ""
    with f.no_grad():
        _reward(model, ("b", rollouts, "s") if each else ("b", "s"), f.autocast or "fp32", wide=each)
    f.mark(EMPTIED)
    del outputs
    weighted = f.record(_weighted_backward, (per_token,), f.new(per_token.dims, "fp32", "advantages"))
    return f.new((), "fp32", "mean", f.record(_weighted_backward, (f.new(per_token.dims, "fp32", "mul", weighted),)))


def _arguments(model: Model) -> list[int]:
    """Numbers of an element of queries, of keys and of values, as flex attention gets them."""
    a = model.arch.blocks[0].attentions[0]
    return [number * int(a.head_dim) for number in (a.num_attention_heads, a.num_key_value_heads, a.num_key_value_heads)]


def _pin(model: Model, name: str, widths: list[int]) -> None:
    """Leave rows of so many numbers for good, from here in the first step on. Where a reward is the peak, those of adapted layers
    are gone: 0.1 % of Llama 3.2 1B."""
    f, running = model.tape, model.running
    rows = 1 if model.adapter is not None else running.batch_size
    row_bytes = rows * running.seq_len * ITEMSIZE[f.autocast or "fp32"]
    f.pinned += [(len(f.log), row_bytes * width, name) for width in widths]


def _write(model: Model, block: int, rollouts: int) -> None:
    """`_generate_strided_blocks`: in each step the model reads all that is written, without a KV cache. The logits of a step, and
    what is made of those of the anchors, live until the next step has its own.
    """
    f, running, head = model.tape, model.running, model.arch.output_embedding
    assert head is not None
    model.running = running._replace(checkpointing=False, use_cache=False, attention="eager")
    dtype = model.parameters.all[0].dtype
    wide = of_anchors = probabilities = None
    for missing in range(block, 0, -1):
        f.sizes_read = {"s": f"s-{missing}anchors"} | ({"b": f"{rollouts}b"} if rollouts > 1 else {})
        model.pass_name, f.module = f"/written {missing}", ""
        model.own_mask = f.new(("b", 1, "s", "s"), dtype, "attention_mask")
        logits = logits_of(model, forward_of(model.arch.model_type)(model))
        in_fp32 = f.to(logits, "fp32")
        del logits
        model.kept.clear()
        f.end_autocast()
        wide = in_fp32
        of_anchors = f.new(("b", "anchors", wide.dims[-1]), "fp32", "index_select")
        of_anchors = f.new(of_anchors.dims, "fp32", "div")
        probabilities = f.new(of_anchors.dims, "fp32", "softmax")
        drawn = f.new(probabilities.dims, "fp32", "multinomial")
        del drawn, in_fp32
    f.sizes_read, model.running, model.pass_name, model.own_mask = {}, running, "", None


def _all_logits(model: Model) -> Tensor:
    """Those of all rollouts in fp32, as accelerate returns them, within an autocast of the trainer's own."""
    hidden = forward_of(model.arch.model_type)(model)
    model.kept.clear()
    logits = logits_of(model, hidden)
    wide = model.tape.to(logits, "fp32")
    model.tape.end_autocast()
    return wide


def _each_rollout(model: Model, rollouts: int, scored: int) -> Tensor:
    """One forward after another, of the backbone and of the head for scored tokens."""
    f = model.tape
    of_each: list[Tensor] = []
    for number in range(rollouts):
        model.pass_name = f"/{number}"
        hidden = forward_of(model.arch.model_type)(model)
        model.kept.clear()
        f.end_autocast()
        of_each.append(_scored(model, hidden, scored))
        del hidden
    f.module = ""
    return f.new((rollouts, "b", "s-1"), "fp32", "cat", f.record(_cat_backward, tuple(of_each)))


def _scored(model: Model, x: Tensor, scored: int) -> Tensor:
    """Log-probabilities of the last tokens, written into a row of zeros. `x`: logits in fp32, or hidden states."""
    f, (rows, seq, width) = model.tape, x.dims
    region = sliced(f, x, (rows, scored, width))
    out = f.new((rows, f"{seq}-1"), "fp32", "zeros")
    chunks: list[Tensor] = []
    for start in range(0, scored, TOKENS_AT_ONCE):
        chunk = sliced(f, region, (rows, min(TOKENS_AT_ONCE, scored - start), width))
        if model.adapter is not None:
            logits = logits_of(model, chunk)
            f.end_autocast()
            chunk = f.to(logits, "fp32")
            del logits
        every = ops.keeps_output(f, chunk, "log_softmax")
        copied = f.new(chunk.dims, "fp32", "contiguous") if model.adapter is None else None  # of a slice (aten cuda/SoftMax.cu)
        chunks.append(gathered_log_probs(f, every))
        del copied, every, chunk
    return Tensor(out.storage, out.dims, out.dtype, f.record(_cat_backward, tuple(chunks)))


def _reward(model: Model, rows: Dims, dtype: str, *, wide: bool) -> None:
    """`wide`: the model is the policy, of which accelerate returns copies in fp32."""
    f, arch = model.tape, model.arch
    layers, width = sum(len(block.layers) for block in arch.blocks), arch.hidden_size or 0
    _mask = f.new((*rows, rows[-1]), dtype, "attention_mask") if wide else None
    states: Dims = (*rows, width)
    if not wide and model.micro_batch == 0:
        _pin(model, "arguments of the copy's flex attention", _arguments(model))
    read = [f.many(states, dtype, "hidden states of layers", layers + 1), f.new((*rows, arch.vocab_size or 0), dtype, "logits")]
    if wide:
        dtype = "fp32"
        copies = [f.new(x.dims, dtype, "logits in fp32") for x in read[1:]]
        copies.append(f.many(states, dtype, "hidden states of layers in fp32", layers + 1))
        del copies
    del read, _mask
    compared = f.many(states, dtype, "hidden states that are compared", FEATURES)
    normed = f.many(states, dtype, "normalize", FEATURES)
    features = f.new((*rows, FEATURES * width), dtype, "cat")
    del compared, normed
    whitening = f.new((FEATURES * width, FEATURES * width), "fp32", "W")
    del features, whitening


def _cat_backward(f: Tape, node: Node, saved: object, g: Tensor) -> list[Tensor]:
    return [Tensor(g.storage, g.dims, g.dtype) for _ in node.edges]


def _weighted_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "mul")
