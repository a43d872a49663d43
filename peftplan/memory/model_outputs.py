"""What a forward of a model returns to the loss, and the copies that accelerate and trainers make of it."""

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.job.loss_sizes import ALL_LOGITS
from peftplan.job.trainer_words import Scoring
from peftplan.memory.heads import head_of
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.program import Program
from peftplan.memory.units import BACKBONE, ROOT
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


def outputs_of(model: Model) -> list[Tensor]:
    """The loss, and what else the outputs hold."""
    head = head_of(model)
    model.units.enter(ROOT)
    model.units.enter(BACKBONE)
    running = model.running
    forward = forward_of(
        model.arch.model_type,
        own_modules=running.own_modules,
        own_decoders=running.own_decoders,
        compiled=running.recorded is not None and running.kernels.decoder is None and model.arch.blocks[0].stack == "decoder",
    )
    if running.router_loss and model.tape.grad_enabled:  # a reference model is not asked for it
        model.router_logits = []
    hidden = model.units.leave(BACKBONE, forward(model))
    router_logits, model.router_logits = model.router_logits, None
    if model.running.own_modules and model.running.loss != "full":  # the loss projects, behind the model
        hidden = model.units.leave(ROOT, hidden)
        model.units.end_forward()
        outputs = [*head(model, hidden)]
    else:
        states = [hidden]
        if running.takes_texts_apart:  # a hook behind the model, which holds no hidden states by then
            del hidden
        outputs = [*head(model, states.pop()), *model.outputs]
        if router_logits:
            from peftplan.memory.router_loss import balanced

            model.load_loss = balanced(model, router_logits)
            outputs += [] if running.loss == "trl-chunked" else router_logits
            del router_logits
        # TRL's loss is of the log-probabilities, LLaMA-Factory v1's of the logits
        by_trainer = (running.loss == "trl-chunked" or model.tape.keeps_graph) and model.units.hooks_each_output
        of_model = 1 if running.without_loss or by_trainer else 0
        outputs[of_model] = model.units.leave(ROOT, outputs[of_model])
        outputs = model.units.hand_out(outputs)
        model.units.end_forward()
    if model.running.peft_type == "ADALORA" and model.running.loss != "trl-chunked":
        from peftplan.memory.methods.adalora import regularized

        outputs[0] = regularized(model, outputs[0])
    model.outputs.clear()
    model.call_locals.clear()
    if model.running.loss not in ALL_LOGITS and not running.returns_hidden_states:
        model.kept.clear()
    model.tape.end_autocast()
    return outputs


def prepared(model: Model, program: Program) -> list[Tensor]:
    """The outputs of a model that accelerate prepared: under autocast fp32 copies of those in 16 bits."""
    f = model.tape
    loss, *outputs = outputs_of(model)
    f.module = ""
    if f.autocast and program.trainer.prepares_model:
        keys = [x for x in model.kept if isinstance(x, Tensor)] if model.running.keeps_keys else []
        wide = [f.to(x.detach(), "fp32") if x.dtype in SIXTEEN_BITS else x for x in (*outputs, *keys)]
        model.kept[:] = wide[len(outputs) :] if keys else model.kept
        outputs, keys = wide[: len(outputs)], []
        wide.clear()
    if program.copies_outputs:
        outputs = [ops.copied(f, x, "clone", viewed=False) for x in outputs]
    return [loss, *outputs]


def wide_logits(model: Model, scoring: Scoring, *, copies: bool) -> Tensor:
    """The logits of a model that returns no loss."""
    wide = widened(model.tape, outputs_of(model)[1], scoring)
    return ops.copied(model.tape, wide, "clone", viewed=False) if copies else wide


def widened(f: Tape, logits: Tensor, scoring: Scoring) -> Tensor:
    """Logits in fp32, as accelerate returns them where it runs the model under autocast."""
    f.module = ""
    return logits if scoring in ("rows", "completions", "rows of completions") and not f.autocast else f.to(logits, "fp32")
