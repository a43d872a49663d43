"""The loss that the loop makes of the logits when the model has returned."""

from peftplan.job.loss_sizes import CUT_APART, MASKED, NO_UPCAST, RECEIVED, SHARED, SHARED_CHUNKS
from peftplan.memory.model import Model
from peftplan.memory.model_outputs import outputs_of
from peftplan.memory.program import Program
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor


def loss_by_loop(model: Model, program: Program, outputs: list[Tensor], teacher: Model | None = None) -> Tensor:
    """The cross entropy that the loop makes of the logits when the model has returned."""
    from peftplan.memory.loss import cross_entropy, weighted_tokens, written_over_logits

    f = model.tape
    if model.running.loss == RECEIVED:
        from peftplan.memory.received_kl import logits_of_teacher, of_both

        outputs.append(logits_of_teacher(model) if teacher is None else _copied_logits(teacher))
        _, logits = outputs_of(model)[:2]
        outputs.append(logits)
        f.module = ""
        return of_both(f, logits, outputs[0])
    if model.running.loss == MASKED:
        from peftplan.memory.masked_tokens import of_masked, see_all

        see_all(model)
    _, logits, *last = outputs_of(model)
    if program.trainer.holds_outputs:
        outputs[:] = [logits, *last]
    f.module = ""
    if program.trainer.weighs_tokens:
        loss = weighted_tokens(f, logits)
    elif model.running.loss == "per-token":
        wide = f.to(logits, "fp32")
        if f.autocast:  # accelerate widens them and drops what the model returned; under DeepSpeed the outputs hold both
            del logits
        loss = cross_entropy(f, wide)
    elif model.running.loss in (SHARED, SHARED_CHUNKS):
        from peftplan.memory.shared_rows import chunked, of_tokens

        wide = f.to(logits, "fp32") if f.autocast else logits
        del logits
        if program.copies_outputs:
            wide = ops.copied(f, wide, "clone", viewed=False)
        loss = (chunked if model.running.loss == SHARED_CHUNKS else of_tokens)(f, wide)
    elif model.running.loss in ("eaft", "eaft-behind"):
        from peftplan.memory.entropy_loss import weighted_behind, weighted_by_entropy

        wide = f.to(logits, "fp32")
        del logits
        loss = (weighted_by_entropy if model.running.loss == "eaft" else weighted_behind)(f, wide)
    elif model.running.loss == MASKED:
        wide = f.to(logits, "fp32")
        del logits
        loss, model.own_mask = of_masked(f, wide), None
    elif model.running.loss == "te-parallel":
        loss = written_over_logits(f, logits)
    elif model.running.loss == CUT_APART:
        from peftplan.memory.cut_apart import cut_behind_model

        loss = cut_behind_model(model, logits, *last[1:])
        last.clear()
    else:
        from peftplan.memory.tensor_parallel import whole_logits

        logits = whole_logits(f, logits)
        loss = cross_entropy(f, logits, dtype=logits.dtype if model.running.loss == NO_UPCAST else "fp32")
    if model.running.mtp_depths:
        from peftplan.memory.further_tokens import with_losses

        loss = with_losses(model, loss, last)
    if not program.trainer.holds_outputs:
        model.kept.clear()
    return loss


def _copied_logits(teacher: Model) -> Tensor:
    """A teacher's logits, `detach().clone()`."""
    f = teacher.tape
    with f.no_grad():
        _, logits = outputs_of(teacher)[:2]
    f.module = ""
    teacher.kept.clear()
    return f.new(logits.dims, logits.dtype, "clone")
