"""CHORD: beside the completions that GRPO scores, the model reads a row whose answer is given, in the same graph.

s tokens of the row, as many as prompts have; v vocabulary. Source: ms-swift 4.6.0, rlhf_trainers/utils.py
(`compute_chord_loss`), trainers/utils.py (`per_token_loss_func`). Left out: numbers of each token.
"""

from __future__ import annotations

from peftplan.job.loss_sizes import OF_ANSWER
from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.model_outputs import outputs_of
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor


class Renamed(dict[str, str]):
    """Every named size → the same of other rows, whose names begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__(b=f"{beginning}b")
        self.beginning = beginning

    def get(self, name: str, default: object = None) -> str:
        """The size of the other rows."""
        return name if type(name) is not str or name.startswith(self.beginning) else self.beginning + name


def with_answers(model: Model, loss: Tensor) -> Tensor:
    """The loss of completions beside that of a row whose answer is given. The row's logits live until both are added up."""
    f, running = model.tape, model.running
    f.read_another(Renamed(OF_ANSWER))
    _batch = [f.new(("b", "s"), "int64", name) for name in ("input_ids", "attention_mask", "labels")]
    model.running, model.pass_name = running._replace(logits_to_keep=None, batch_size=1), "/answer"
    _, logits = outputs_of(model)[:2]
    model.kept.clear()
    f.module = ""
    of_answers = cross_entropy(f, f.to(logits, "fp32"))
    model.running, model.pass_name = running, ""
    return ops.add(f, ops.scale(f, loss), ops.scale(f, of_answers))
