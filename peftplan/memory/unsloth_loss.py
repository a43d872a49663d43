"""Unsloth's fused linear cross entropy: forward makes the gradient of the hidden states, chunk by chunk, from fp32 logits.

n scored tokens, h hidden size, v vocabulary. Source: unsloth_zoo 2026.10.9 `fused_losses/fused_linear.py`: `_ce_impl`,
`_tiled_forward`, `_Buffers`, `_row_forward`, `_ce_backward`; as on a card of over 24.5 GiB, of which 4 GiB or more are free.
"""

from __future__ import annotations

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.errors import NeedsTraceError, NoEngineError
from peftplan.job.loss_sizes import CHUNK_FACTS, HALF, SPLIT_COLUMNS, WIDE
from peftplan.ledger import Dim
from peftplan.memory import fake_quantized
from peftplan.memory.chunked_loss import rows_of, sum_of_rows
from peftplan.memory.heads import logits_of
from peftplan.memory.loss import projection
from peftplan.memory.model import Model
from peftplan.memory.model_outputs import outputs_of
from peftplan.memory.trained_head import of_trained_head
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor
from peftplan.units import ceil_div

FEW_SPLITS = 2
"""Up to so many parts of the vocabulary are one (`_tiled_vocab`)."""
STATISTICS, PARTIAL_STATISTICS = 7, 8
"""fp32 numbers per token and split of the vocabulary, chunked and tiled."""
COLUMN_MULTIPLE = 8
TILED_FROM, OF_TILES = 1, {name: 2 + CHUNK_FACTS * place for place, name in enumerate(("tile", f"rows{HALF}", f"rows{WIDE}"))}
"""Places of `LossSizes.facts`: whether a frozen head is tiled; how many chunks are run before the last."""


def unsloth(model: Model, x: Tensor) -> tuple[Tensor]:
    """`unsloth_fused_ce_loss` in training: a loss, no logits. Raises NeedsTraceError for a head with a bias."""
    f = model.tape
    head = projection(model)
    if head.bias is not None:
        raise NeedsTraceError(f"the unsloth loss of {model.arch.model_type} with a bias")
    f.module = ""
    batch, seq = x.dims[:-1]
    ignored = f.new((batch, 1), "int64", "full_like")
    targets = f.new((batch, seq), "int64", "cat")
    del ignored
    hidden = ops.reshaped(f, x)
    weight = model.table(head.name, head)
    kernels = model.running.kernels
    if kernels.decoder is not None and kernels.layers is not None and kernels.layers.scheme:  # models/llama.py:237
        weight = fake_quantized.frozen(f, weight)
    f.module = ""
    loss = _cross_entropy(model, hidden, weight)
    del targets
    return (loss,)


def of_all_logits(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """`fast_cross_entropy_loss`, where the caller asks for logits (`UNSLOTH_RETURN_LOGITS`): they are kept in their dtype, and
    backward makes their gradient in it (unsloth 2026.10.9, models/llama.py:2087, kernels/cross_entropy_loss.py)."""
    f = model.tape
    logits = logits_of(model, x)
    f.module = ""
    tokens = logits.dims[:-1]
    labels = f.new(tokens, "int64", "empty_like")
    node = f.record(_all_logits_backward, (logits,))
    losses = f.new(tokens, "fp32", "losses")
    f.keep(node, logits.detach(), f.new(tokens, "fp32", "logsumexp"), losses, labels)
    return ops.scale(f, f.new((), "fp32", "sum", node), "div"), logits


def _all_logits_backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, saved[0].dtype, "empty_like")


def of_completions(model: Model, x: Tensor) -> tuple[Tensor]:
    """`grpo_accumulated_loss`: the log-probabilities of the completions' tokens.

    Their hidden states are copied from a packed row or from padded ones, and read where they lie in a row of one completion. Left
    out: numbers of tokens after these. Raises NeedsTraceError for a head that trains or has a bias.

    Source: unsloth_zoo 2026.10.9 `rl_replacements.py` (`grpo_accumulated_loss`, sequence packing), `fused_losses/fused_linear.py`
    (`_logprobs_impl` with `want_u`, `_lp_backward`).
    """
    f = model.tape
    head = projection(model)
    f.module = ""
    weight = model.table(head.name, head)
    trains = weight.node is not None
    if head.bias is not None or (trains and (model.running.recorded is None or not model.running.flash)):
        raise NeedsTraceError(f"Unsloth's GRPO of {model.arch.model_type} with a head that trains or has a bias")
    mask = f.new(x.dims[:-1], "bool", "completions")
    if model.running.recorded is not None:  # rows of several completions
        chosen = sliced(f, sliced(f, x, ("n", x.dims[-1])), ("n", x.dims[-1]))
        chosen = ops.copied(f, chosen, "reshape") if model.running.batch_size > 1 else chosen
    elif model.running.kernels.padding_free is None:
        chosen = sliced(f, sliced(f, x, x.dims), ("n", x.dims[-1]))
    else:
        row = sliced(f, x, x.dims)
        chosen = rows_of(f, sliced(f, row, x.dims), mask)
    targets = f.new(("n",), "int64", "index")
    loss = of_trained_head(model.tape, chosen, weight) if trains else _cross_entropy(model, chosen, weight, copies=False)
    del targets, mask
    return (loss,)


def of_pairs(model: Model, x: Tensor) -> Tensor:
    """The loss of ORPO, of hidden states in fp32: log-probabilities of all tokens of chosen rows, and of rejected completions.

    Left out: masks and numbers of tokens; the scratch of the sum of the head's rows, from which the mean of logits is made, less
    than the tiles before. Raises NoEngineError for fewer tokens than make tiles, NeedsTraceError for a head that trains or has a
    bias. Source: unsloth 2026.10.9, models/rl_replacements.py (`_unsloth_pref_chunked_forward`); unsloth_zoo 2026.10.9,
    fused_losses/chunked_logprob.py (`unsloth_masked_logprobs`), preference_loss.py (`linear_mean_logits`).
    """
    f = model.tape
    head = projection(model)
    f.module = ""
    weight = model.table(head.name, head)
    if head.bias is not None or weight.node is not None:
        raise NeedsTraceError(f"Unsloth's ORPO of {model.arch.model_type} with a head that trains or has a bias")
    if not model.running.loss_facts[TILED_FROM]:
        raise NoEngineError("Unsloth's ORPO of so few tokens that it makes no tiles (no formula yet)")
    rows, seq, width = x.dims
    shorter = f"{seq}-1"
    batch = [f.new((rows, seq), "int64", name) for name in ("input_ids", "attention_mask", "labels")]
    targets = f.new((rows, shorter), "int64", "where")
    copied = ops.copied(f, sliced(f, x, (rows, shorter, width)), "reshape")
    loss = _cross_entropy(model, copied, weight)
    del copied
    flat = f.new((rows, shorter, width), x.dtype, "reshape")
    del flat, targets, batch
    return loss


def of_hidden_rows(model: Model) -> Tensor:
    """The log-probability of each row's completion, from the hidden states of a model that returns those of every layer.

    accelerate's copies in fp32 of all of them live until the rows are summed. Left out: masks, and numbers of tokens. Raises
    NeedsTraceError for a head that trains or has a bias.

    Source: `DPOTrainer.concatenated_forward` of trl before 0.29 (`output_hidden_states`), unsloth 2026.10.9,
    models/rl_replacements.py (`dpo_trainer_chunked_logprobs`, `_unsloth_dpo_hidden_logps`); unsloth_zoo 2026.10.9,
    fused_losses/fused_linear.py (`_logprobs_impl` with `want_u`, `_lp_backward`).
    """
    f = model.tape
    hidden = outputs_of(model)[1]
    f.module = ""
    wide = f.to(hidden, "fp32")
    layers = [f.new(hidden.dims, "fp32", "hidden states of a layer") for _ in model.kept]
    del hidden
    head = projection(model)  # which drops what the outputs held
    weight = model.table(head.name, head)
    if head.bias is not None or weight.node is not None:
        raise NeedsTraceError(f"Unsloth's DPO of {model.arch.model_type} with a head that trains or has a bias")
    log_probs = _log_probs(model, wide, weight)
    summed = sum_of_rows(f, log_probs)
    del wide, layers, log_probs
    return summed


def _log_probs(model: Model, hidden: Tensor, weight: Operand) -> Tensor:
    """`fused_linear_logprobs` of the tokens of completions, with zeros for others."""
    f, into_hidden = model.tape, hidden.node is not None
    node = f.record(_log_probs_backward, (hidden,))
    with f.no_grad():
        numbers = f.many(hidden.dims[:-1], "fp32", "lse, mean, logps", 3)
        gradient = f.new(hidden.dims, hidden.dtype, "u") if into_hidden else None
        _in_parts(model, hidden, weight, f.autocast or weight.dtype, trains=(into_hidden, None), copies=True, lasts=False)
    log_probs = f.new(hidden.dims[:-1], "fp32", "logps", node)
    del numbers
    f.keep(node, gradient)
    return log_probs


def _log_probs_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    """What forward made, each row of it scaled into a tensor of its own (`fused_linear_scale_rows`)."""
    return f.new(saved[0].dims, saved[0].dtype, "scaled")


def _chunks(model: Model, name: str) -> tuple[Dim, ...]:
    """Tokens of each chunk, of those between the first and the last one or two."""
    facts, at = model.running.loss_facts, OF_TILES[name]
    return (*(name,) * sum(facts[at : at + CHUNK_FACTS]), f"{name} rest") if facts[0] else ()


def _cross_entropy(model: Model, hidden: Tensor, weight: Operand, *, copies: bool = True) -> Tensor:
    """`copies`: whether the tokens of a chunk are copied out of the hidden states (`_ce_impl`), or are rows of them that lie
    together, into whose gradient a chunk's product is written (`_logprobs_impl`).
    """
    f = model.tape
    dtype = f.autocast or weight.dtype
    into_hidden, into_weight = hidden.node is not None, weight.node is not None
    node = f.record(_cross_entropy_backward, (hidden, weight))
    with f.no_grad():
        indices = f.new(("n",), "int64", "kept")
        grad_hidden = f.new(hidden.dims, hidden.dtype, "grad_h") if into_hidden else None
        grad_weight = f.new(weight.dims, weight.dtype, "acc_w") if into_weight else None
        stored = None if weight.dtype == dtype else f.new(weight.dims, dtype, "to")
        log_probs = f.new(("n",), "fp32", "lp_all")
        _in_parts(model, hidden, weight, dtype, trains=(into_hidden, grad_weight), copies=copies, lasts=copies)
        wide = f.new(("n",), "fp64", "to")
        wide = f.new(("n",), "fp64", "neg")
    loss = f.new((), "fp32", "sum", node)
    del wide, log_probs, stored, indices
    f.keep(node, grad_hidden, grad_weight)
    return loss


def _in_parts(
    model: Model, hidden: Tensor, weight: Operand, dtype: str, *, trains: tuple[bool, Tensor | None], copies: bool, lasts: bool
) -> None:
    """Logits tile by tile or chunk by chunk. `trains`: whether the hidden states have a gradient, and the weight's."""
    vocab, modern = weight.dims[0], model.running.flash
    assert isinstance(vocab, int)
    fp32 = dtype == "fp16" or (dtype == "bf16" and modern)
    many = ceil_div(vocab, SPLIT_COLUMNS) > FEW_SPLITS
    if fp32 and modern and many and model.running.loss_facts[TILED_FROM] and trains[1] is None:
        _tiled(model, hidden, vocab, dtype, copies=copies)
    else:
        _chunked(model, hidden, weight, dtype, fp32=fp32, trains=trains, copies=copies, lasts=lasts)


def _logits(f: Tape, dims: tuple[Dim, ...], dtype: str) -> Tensor:
    buffer = f.new(dims, dtype, "logits, in chunks")
    assert buffer.storage is not None
    f.category[buffer.storage.number] = "logits"
    return buffer


def _tiled(model: Model, hidden: Tensor, vocab: int, dtype: str, *, copies: bool) -> None:
    """`_tiled_forward`: a tile of logits becomes probabilities in place; an fp32 accumulator of a chunk's gradient."""
    f, splits = model.tape, ceil_div(vocab, SPLIT_COLUMNS)
    log_sums = f.new(("n",), "fp32", "lse")
    buffer = _logits(f, ("tile", SPLIT_COLUMNS), "fp32")
    accumulator = f.new(("tile", hidden.dims[-1]), "fp32", "acc")
    maximum = f.new(("tile",), "fp32", "m_run")
    chunk = part = None
    for rows in _chunks(model, "tile"):
        chunk = _chosen(f, rows, hidden, dtype) if copies else None
        part = f.new((PARTIAL_STATISTICS, splits, rows), "fp32", "part")
        f.products.append((len(f.log), "cuBLAS"))
    del chunk, part, maximum, accumulator, buffer, log_sums


def _chosen(f: Tape, rows: Dim, hidden: Tensor, dtype: str) -> Tensor:
    """`hidden.index_select(0, …).to(dtype)`."""
    chosen = f.new((rows, hidden.dims[-1]), hidden.dtype, "index_select")
    return chosen if hidden.dtype == dtype else f.new(chosen.dims, dtype, "to")


def _chunked(
    model: Model,
    hidden: Tensor,
    weight: Operand,
    dtype: str,
    *,
    fp32: bool,
    trains: tuple[bool, Tensor | None],
    copies: bool,
    lasts: bool,
) -> None:
    """One buffer of a chunk's logits, which become their gradient in place. `lasts`: whether the product with it lasts until the
    next chunk's (`_ce_impl`)."""
    f, (vocab, width) = model.tape, weight.dims
    assert isinstance(vocab, int)
    into_hidden, grad_weight = trains
    name, splits = f"rows{WIDE if fp32 or dtype == 'fp32' else HALF}", ceil_div(vocab, SPLIT_COLUMNS)
    columns = ceil_div(vocab, COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    buffer = _logits(f, (name, columns), "fp32" if fp32 else dtype)
    chunk = targets = product = None
    for rows in _chunks(model, name):
        if copies:
            chunk = _chosen(f, rows, hidden, dtype)
            targets = f.new((rows,), "int64", "index_select")
        elif hidden.dtype != dtype:
            chunk = f.new((rows, width), dtype, "to")
        f.products.append((len(f.log), "cuBLAS"))
        statistics = f.new((STATISTICS, splits, rows), "fp32", "part") if splits > FEW_SPLITS else None
        del statistics
        targets = None
        if into_hidden:
            product = f.new((rows, width), "fp32" if dtype in SIXTEEN_BITS else dtype, "mm")
            if copies:
                narrow = f.to(product.detach(), hidden.dtype)
                del narrow
            product = product if lasts else None
        if grad_weight is not None:
            _into(f, weight, rows, dtype)
    del chunk, targets, product, buffer


def _into(f: Tape, weight: Operand, rows: Dim, dtype: str) -> None:
    """`_addmm_fp32`: the product goes straight into a gradient of its dtype or of fp32."""
    if weight.dtype in (dtype, "fp32"):
        f.products.append((len(f.log), "cuBLAS"))
        return
    product = f.new(weight.dims, weight.dtype, "mm")
    del product


def _cross_entropy_backward(f: Tape, node: Node, saved: tuple[Tensor | None, Tensor | None], g: Tensor) -> Gradients:
    """Each gradient scaled into a tensor of its own (`fused_linear_scale_rows`)."""
    return [None if grad is None else f.new(grad.dims, grad.dtype, "scaled") for grad in saved]
