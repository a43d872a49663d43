"""PPO's loss of a policy and of a value model, both of which train.

b rows, s tokens, n / b of a completion, v vocabulary. Variables of the loop hold what a micro batch gave until the next forward
has returned: the policy's logits, its KV cache and the hidden states of its layers. The probabilities behind its loss stay until
the next ones are there, and the logits of which completions were drawn until the next rollout's are.

Source: trl before 1.16, experimental/ppo/ppo_trainer.py (`PolicyAndValueWrapper`, `train`). Left out: numbers of tokens; what is
made behind the step, when the gradients are gone.
"""

from __future__ import annotations

from peftplan.memory.model import Model
from peftplan.memory.model_outputs import outputs_of
from peftplan.memory.models import forward_of
from peftplan.memory.pair_logits import divided_rows
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

SCORE = "score"


def logits_of_rollout(f: Tape, model: Model, micro_batches: int) -> Tensor:
    """Those of which all completions of a step were drawn."""
    return f.many(("b", "n/b", model.arch.vocab_size or 0), "fp32", "logits of the rollout", micro_batches)


def loss_of_policy_and_values(model: Model, critic: Model, outputs: list[Tensor]) -> Tensor:
    """`outputs`: the logits of the micro batch before, and probabilities; replaced."""
    f, before = model.tape, model.kept
    model.kept, model.pass_name, critic.pass_name = [], "/policy", "/values"
    critic.micro_batch, critic.batch = model.micro_batch, model.batch
    hidden = forward_of(critic.arch.model_type)(critic)
    values = critic.linear(SCORE, hidden)
    f.module = ""
    del hidden
    logits = outputs_of(model)[1]
    f.module = ""
    critic.kept.clear()
    before.clear()
    outputs[:] = [logits.detach(), *outputs[1:]]
    rows, _, vocab = logits.dims
    completions: Dims = (rows, "n/b", vocab)
    per_token = divided_rows(f, logits, completions, count=model.running.batch_size)
    del logits
    node = f.record(_loss_backward, (per_token, values), *((x.dims, x.dtype) for x in (per_token, values)))
    return f.new((), "fp32", "mean", node)


def statistics(f: Tape, outputs: list[Tensor]) -> None:
    """The entropy behind a micro batch: `softmax` of the logits stays, its product with them does not."""
    rows, _, vocab = outputs[0].dims
    dims, dtype = (rows, "n/b", vocab), outputs[0].dtype
    probabilities = f.new(dims, dtype, "softmax")
    outputs[1:] = []
    exponentials = f.new(dims, dtype, "exp")
    del exponentials
    product = f.new(dims, dtype, "mul")
    del product
    outputs[1:] = [probabilities]


def _loss_backward(f: Tape, node: Node, saved: tuple[tuple[Dims, str], ...], g: Tensor) -> tuple[Tensor, Tensor]:
    of_tokens, of_values = saved
    return f.new(*of_tokens, "mul"), f.new(*of_values, "slice_backward")
