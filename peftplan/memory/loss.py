"""Loss and logits: what each way to compute a language model's loss allocates.

Source: transformers, loss/loss_utils.py (`ForCausalLMLoss`): logits in fp32, labels padded and shifted, cross entropy over
all positions. torch's cross entropy is log_softmax and nll_loss.
"""

from __future__ import annotations

from peftplan.errors import RefusedError
from peftplan.job.loss_sizes import CUT_APART, READ_THROUGH
from peftplan.ledger import Dim
from peftplan.memory.model import Model
from peftplan.memory.parts import Part
from peftplan.memory.units import ROOT
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor
from peftplan.versions import named


def cross_entropy(f: Tape, logits: Tensor, labels: Tensor | None = None, *, dtype: str = "fp32") -> Tensor:
    """`cross_entropy` of logits in `dtype`: keeps the log probabilities, and one weight. `labels`: those that are there
    already."""
    log_probabilities = ops.keeps_output(f, f.to(logits, dtype), "log_softmax")
    labels = f.new(logits.dims[:-1], "int64", "shifted labels") if labels is None else labels
    node = f.record(_nll_backward, (log_probabilities,), log_probabilities.dims, labels)
    loss = f.new((), dtype, "nll_loss", node)
    f.keep(node, f.new((), dtype, "nll_loss total weight"))
    return loss


def _nll_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "nll_loss_backward")


def written_over_logits(f: Tape, logits: Tensor) -> Tensor:
    """NeMo Automodel's `TEParallelCrossEntropy`: forward writes the gradient over the logits, in their dtype.

    Source: nemo_automodel 0.7.0, components/loss/te_parallel_ce.py, triton/te_cross_entropy.py.
    """
    tokens = logits.dims[:-1]
    _labels = f.new(tokens, "int64", "labels")
    node = f.record(_written_backward, (logits,))
    losses = f.new(tokens, "fp32", "loss_1d")
    statistics = f.new((*tokens, 3), "fp32", "m_d_X_y")
    valid = f.new(tokens, "bool", "ne")
    del valid, statistics
    f.keep(node, logits.detach())
    loss = f.new((), "fp32", "sum", node)
    del losses
    return ops.scale(f, loss)


def _written_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    """Scales what forward wrote, token by token."""
    scales = f.new(saved[0].dims[:-1], "fp32", "contiguous")
    del scales
    return saved[0]


def nll_of_tokens(f: Tape, logits: Tensor, labels: Tensor) -> Tensor:
    """`CrossEntropyLoss(reduction="none")` of fp32 logits: keeps the log probabilities and the labels."""
    log_probabilities = ops.keeps_output(f, logits, "log_softmax")
    node = f.record(_nll_backward, (log_probabilities,), log_probabilities.dims, labels)
    return f.new(labels.dims, "fp32", "nll_loss", node)


def weighted_tokens(f: Tape, logits: Tensor) -> Tensor:
    """LLaMA-Factory v1's `compute_log_probs` and the sum of its results by their weights: the logits once more in fp32, a copy
    of them without the last position, and the cross entropy of each token.

    Source: llamafactory 0.9.5, v1/core/base_trainer.py, v1/trainers/sft_trainer.py.
    """
    wide = f.to(logits, "fp32")
    batch, seq, vocab = wide.dims
    shorter = (batch, f"{seq}-1")
    labels = f.new(shorter, "int64", "contiguous")
    view = sliced(f, wide, (*shorter, vocab))
    shifted = ops.copied(f, view, "contiguous", viewed=False) if f.several else view
    log_probabilities = ops.keeps_output(f, shifted, "log_softmax")
    of_token = f.new(shorter, "fp32", "nll_loss", f.record(_nll_backward, (log_probabilities,), log_probabilities.dims, labels))
    of_token = ops.scale(f, ops.scale(f, of_token, "neg"), "neg")
    weighted = ops.scale(f, of_token)
    del wide, view, shifted, log_probabilities, of_token
    return ops.summed(f, weighted)


def causal_lm_loss(f: Tape, logits: Tensor, *, shifts: bool = False, shifted: Tensor | None = None) -> Tensor:
    """`ForCausalLMLoss`. `shifts`: as transformers before 4.49, which copies the logits without the last position. `shifted`:
    the batch's own shifted labels."""
    wide = f.to(logits, "fp32")
    if shifted is not None:
        return cross_entropy(f, wide, shifted)
    if shifts:
        return cross_entropy(f, without_last(f, wide))
    batch, seq, _ = wide.dims
    more = seq + 1 if isinstance(seq, int) else f"{seq}+1"
    padded = f.new((batch, more), "int64", "padded labels")
    loss = cross_entropy(f, wide)
    del padded
    return loss


def without_last(f: Tape, logits: Tensor) -> Tensor:
    """`logits[..., :-1, :].contiguous()`, which copies nothing of one row."""
    shifted = _but_last(f, logits)
    return ops.copied(f, shifted, "shifted logits", viewed=False) if f.several else shifted


def selected_without_last(f: Tape, logits: Tensor) -> Tensor:
    """`logits[..., :-1, :][mask]`, of a mask that shows all tokens."""
    shifted = _but_last(f, logits)
    return ops.gathered(f, shifted, shifted.dims)


def _but_last(f: Tape, logits: Tensor) -> Tensor:
    batch, seq, vocab = logits.dims
    return sliced(f, logits, (batch, seq - 1 if isinstance(seq, int) else f"{seq}-1", vocab))


def plain_cross_entropy(f: Tape, logits: Tensor) -> Tensor:
    """`CrossEntropyLoss` in the dtype of the logits. Autocast casts for `nll_loss`, not for `log_softmax`, whose dtype torch
    states itself (aten LossNLL.cpp, `cross_entropy_loss`; `set_opt_dtype` of autocast_mode.h)."""
    log_probabilities = ops.keeps_output(f, logits, "log_softmax")
    if f.autocast:
        log_probabilities = f.cast(log_probabilities, "fp32")
    node = f.record(_plain_nll_backward, (log_probabilities,), log_probabilities)
    loss = f.new((), log_probabilities.dtype, "nll_loss", node)
    f.keep(node, f.new((), log_probabilities.dtype, "nll_loss total weight"))
    return loss


def _plain_nll_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, saved[0].dtype, "nll_loss_backward")


def chunks(model: Model) -> tuple[Dim, ...]:
    """Tokens of each chunk, those between the first and the last once: they are equal."""
    tokens, *more = model.running.loss_facts[:3]
    return (*("rows",) * sum(more), "rest") if tokens else ()


def read_by_loss(f: Tape, head: Part) -> None:
    """The model's forward reads the head's parameters itself."""
    for p in (head.weight, head.bias):
        if f.modules is not None and p is not None:
            f.modules.read(ROOT, None, p)


def projection(model: Model) -> Part:
    """The output projection whose weight a loss reads itself; a KV cache that the model returned goes, a prefix the caller holds.

    Raises RefusedError where an adapter on it would not train; Liger asks a wrapper for its weight, and gets that of the layer
    within. NeMo Automodel's adapter is part of the layer.
    """
    if model.running.peft_type != "PREFIX_TUNING":
        model.kept.clear()
    assert model.arch.output_embedding is not None
    head = model.part(model.arch.output_embedding)
    if head.name in model.token_adapters and model.running.loss not in READ_THROUGH:
        raise RefusedError(f"{named('trl')} refuses it: AttributeError: 'TrainableTokensWrapper' object has no attribute 'bias'")
    if model.running.loss not in ("liger", CUT_APART) and any(key not in ("weight", "bias") for key in head.params):
        raise RefusedError(
            f"target_modules: {model.running.loss} reads lm_head.weight itself, so an adapter on it would not train"
        )
    return head
