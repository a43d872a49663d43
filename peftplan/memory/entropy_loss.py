"""EAFT: the cross entropy of each token, weighted by the entropy of its largest logits.

n scored tokens, k of the largest logits, v vocabulary. Source: axolotl 0.19.0, monkeypatch/loss/eaft.py (`eaft_loss`);
llamafactory 0.9.5, train/trainer_utils.py (`_eaft_cross_entropy`).
"""

from __future__ import annotations

from peftplan.memory.chunked_loss import rows_of
from peftplan.memory.loss import nll_of_tokens
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

LARGEST = 20
"""axolotl's default of `eaft_k`, and LLaMA-Factory's number."""


def weighted_by_entropy(f: Tape, logits: Tensor) -> Tensor:
    """The sum over scored tokens, divided by their number. Scored logits are picked twice; what the model returned lasts."""
    batch, seq, vocab = logits.dims
    view = sliced(f, logits, (batch, f"{seq}-1", vocab))
    shifted = ops.copied(f, view, "contiguous", viewed=False) if f.several else view
    rows = ops.reshaped(f, shifted, ("n", vocab))
    mask = f.new(("n",), "bool", "ne")
    with f.no_grad():
        picked = rows_of(f, rows, mask)
        top = f.new(("n", LARGEST), "fp32", "topk"), f.new(("n", LARGEST), "int64", "topk")
        del picked
        weights = f.new(("n",), "fp32", "pow")
        del top
    picked = rows_of(f, rows, mask)
    labels = f.new(("n",), "int64", "index")
    of_token = nll_of_tokens(f, picked, labels)
    del picked, labels
    return ops.scale(f, ops.summed(f, ops.mul(f, of_token, weights)), "div")


def weighted_behind(f: Tape, logits: Tensor) -> Tensor:
    """LLaMA-Factory's: cross entropies of all tokens, of which the scored ones are picked, and so are their logits, once."""
    of_token = nll_of_tokens(f, logits, f.new(logits.dims[:-1], "int64", "contiguous"))
    mask = f.new(of_token.dims, "bool", "ne")
    scored = rows_of(f, of_token, mask)
    with f.no_grad():
        _picked = rows_of(f, logits.detach(), mask)
        top = f.new(("n", LARGEST), "fp32", "topk"), f.new(("n", LARGEST), "int64", "topk")
        weights = f.new(("n",), "fp32", "pow")
        del top
    return ops.scale(f, ops.summed(f, ops.mul(f, scored, weights)), "div")
