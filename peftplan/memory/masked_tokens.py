"""The cross entropy of masked tokens that a language model restores, as axolotl's diffusion trains it.

b rows of s tokens, n masked ones, v vocabulary. The trainer makes the mask of attention, which hides nothing; logits in fp32 are
shifted by a copy of all, of which the rows of masked tokens are picked. Source: axolotl 0.19.0, integrations/diffusion/trainer.py
(`_compute_diffusion_loss`), utils.py (`create_bidirectional_attention_mask`, `shift_logits_to_input_positions`). Left out: the
masked copy of the tokens and numbers for each token.
"""

from __future__ import annotations

from peftplan.memory.loss import nll_of_tokens
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import cat, sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def see_all(model: Model) -> None:
    """Give the model a mask of the trainer's own: every token sees every other of its row."""
    model.own_mask = model.tape.new(("b", 1, "s", "s"), "bool", "ones")


def of_masked(f: Tape, logits: Tensor) -> Tensor:
    """The loss of the logits in fp32, which live until it is made, as do their shifted copy and the rows of masked tokens."""
    batch, seq, vocab = logits.dims
    parts = sliced(f, logits, (batch, 1, vocab)), sliced(f, logits, (batch, f"{seq}-1", vocab))
    shifted = cat(f, parts, logits.dims)
    picked = f.new(("n", vocab), "fp32", "index", f.record(_picked_backward, (shifted,), shifted.dims))
    labels = f.new(("n",), "int64", "index")
    of_token = nll_of_tokens(f, picked, labels)
    del picked, shifted, parts
    return ops.summed(f, ops.scale(f, of_token, "div"))


def _picked_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "new_zeros")
