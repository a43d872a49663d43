"""Step programs: the loop around the model decides what is alive when.

Source: transformers, trainer.py (`training_step`, `compute_loss`); trl, `SFTTrainer.compute_loss`; accelerate,
utils/operations.py (`ConvertOutputsToFp32`). The same programs as `trace.steps` runs.
"""

from contextlib import nullcontext
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.job.loss_sizes import ALL_LOGITS
from peftplan.job.trainer import LOSS, Forward, Scoring, Trainer
from peftplan.memory.batch import batch_of
from peftplan.memory.heads import head_of
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.optimizer import optimizer_step
from peftplan.memory.scaler import Scaler
from peftplan.memory.units import BACKBONE, ONE_GPU, ROOT
from peftplan.optim import Optimizer
from peftplan.parameters import Parameter
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

HALF = ("fp16", "bf16")
TRIPLE = 3
"""Rows of an example that is a chosen, a rejected and a reference completion."""


class Program(NamedTuple):
    """The fields of the setup that decide the loop."""

    trainer: Trainer
    keep_outputs: bool
    optimizer: Optimizer
    accumulation: int = 1
    keep_gradients: bool = False
    left_alone: frozenset[str] = frozenset()
    """Parameters that get gradients but that the optimizer does not update."""
    frees_outputs: bool = False
    """Whether kept outputs are freed after each backward."""
    shards: tuple[Parameter, ...] | None = None
    """What the optimizer steps over, where it is not the whole parameters."""
    scales: bool = False
    """Whether the loss is scaled, as accelerate does for `mixed_precision="fp16"`."""
    syncs_each_batch: bool = False
    """Whether gradients are reduced in every micro batch, not in the last alone."""
    forwards: tuple[Forward, ...] = LOSS
    """The forwards of a micro batch."""
    steps_in_backward: bool = False
    """Whether accelerate's `backward` also clips and steps, as under DeepSpeed: the loss, and its graph, is still there then."""


def steady_step(model: Model, program: Program, reference: Model | None = None) -> None:
    """One steady optimizer step. `reference`: the model that the policy is compared with, where a forward runs it."""
    f = model.tape
    kernels = model.running.kernels
    if kernels.decoder is not None or kernels.checkpoint is not None or model.running.own_decoders:
        from peftplan.memory.lasting import kept_on_card

        kept_on_card(model)
    model.batch = batch_of(model)
    if program.trainer.always_masks and "attention_mask" not in model.batch:
        model.batch["attention_mask"] = f.new(("b", "s"), "int64", "attention_mask")
    if program.trainer.weighs_tokens:
        for name, dtype in (("position_ids", "int64"), ("loss_weights", "fp32")):
            model.batch[name] = f.new(("b", "s"), dtype, name)
    for rows in dict.fromkeys(forward.batch for forward in program.forwards if forward.batch):
        for name in ("input_ids", "attention_mask", "completion_mask"):
            model.batch[f"{rows}{name}"] = f.new(("b", "s"), "int64", f"{rows}{name}")
    if program.keep_gradients:
        model.keep_gradients()
    scaler = Scaler(f) if program.scales and program.trainer.prepares_model else None
    outputs: list[Tensor] = []
    last = _micro_batches(model, program) - 1
    for number in range(last + 1):
        model.micro_batch = number
        f.segment = abs(f.segment) + 1  # forward code again, after the backward of the micro batch before
        f.mark("forward")
        if program.trainer.sums_rows:
            scoring = program.trainer.scoring
            loss = (
                _preference_loss(model, program, reference)
                if scoring is None
                else _loss_of_logits(model, program, reference, scoring)
            )
        else:
            loss = (
                _loss_apart(model, program, reference) if program.trainer.drops_outputs else _plain_loss(model, outputs, program)
            )
        f.mark("backward")
        scaled = loss if scaler is None else scaler.scaled(f, loss)
        model.units.begin_backward(syncs=program.syncs_each_batch or number == last)
        f.backward(scaled)
        model.units.end_backward()
        loss_in_step = loss if number == last and program.steps_in_backward else None
        del loss, scaled
        if program.frees_outputs:
            outputs.clear()
            model.kept.clear()
    model.units.before_step()
    f.mark("step")
    f.module = ""
    stepped = model.parameters.all if program.shards is None else program.shards
    if scaler is not None:
        scaler.unscale(f, stepped)
    idle = model.units.idle(model.idle())
    model.forget_gradients(idle)
    trained = [p for p in stepped if p.trainable and p.name not in idle | program.left_alone]
    freezes_a = bool(getattr(model.running.config, "freeze_a", False))
    clips = program.trainer.clips_gradients and not program.steps_in_backward
    for group in model.units.groups(trained):
        optimizer_step(f, program.optimizer, group, clips=clips, freezes_a=freezes_a)
    if model.running.peft_type == "ADALORA":
        from peftplan.memory.methods.adalora import allocate

        allocate(model)
    del loss_in_step
    outputs.clear()
    model.kept.clear()


MOST_MICRO_BATCHES = 8
"""How many are run of gradients that take segments of their own. Left out: what later ones still move (Gemma 2 of 46 layers, 16
micro batches: nothing; Gemma 2 9B: 0.04 % of the reserved bytes)."""


def _micro_batches(model: Model, program: Program) -> int:
    """How many micro batches are run. Large segments of gradients that are added to others find other room each time."""
    if program.keep_gradients and not program.keep_outputs:  # every micro batch meets what the first does
        return 1
    if program.accumulation <= model.units.micro_batches or model.units is not ONE_GPU:
        return min(program.accumulation, model.units.micro_batches)
    from peftplan.allocator.config import MIN_LARGE_ALLOC

    large = any(p.trainable and p.numel * ITEMSIZE[p.dtype] >= MIN_LARGE_ALLOC for p in model.parameters.all)
    return min(program.accumulation, MOST_MICRO_BATCHES if large else model.units.micro_batches)


def _plain_loss(model: Model, outputs: list[Tensor], program: Program) -> Tensor:
    """`outputs = model(**batch)`: the outputs of the micro batch before live until this forward has returned."""
    before, model.kept = model.kept, []
    loss, *others = _forward(model)
    outputs[:] = others or [loss]  # either holds the graph, and with it what its nodes do not release
    del before
    if not program.keep_outputs:
        outputs.clear()
        model.kept.clear()
    return loss


def _loss_apart(model: Model, program: Program, reference: Model | None) -> Tensor:
    """`compute_loss`, which drops the outputs, fp32 copies of them under accelerate's autocast."""
    f = model.tape
    if program.trainer.scoring is not None:
        from peftplan.memory.pair_logits import loss_of_completions, loss_of_pairs, loss_of_triples

        of_rows = loss_of_triples if program.trainer.rows == TRIPLE else loss_of_pairs
        of_logits = loss_of_completions if program.trainer.generates else of_rows
        return of_logits(f, _wide_logits(model, program.trainer.scoring), program.trainer.scoring, count=model.running.batch_size)
    if program.trainer.loss_apart:
        from peftplan.memory.loss import cross_entropy, written_over_logits

        _, logits = _forward(model)
        f.module = ""
        loss = (written_over_logits if model.running.loss == "te-parallel" else cross_entropy)(f, logits)
        model.kept.clear()
        return loss
    if program.trainer.teaches:
        return _distilled(model, program, reference)
    if program.trainer.weighs_tokens:
        from peftplan.memory.loss import weighted_tokens

        of_model, logits = _forward(model)
        f.module = ""
        loss = weighted_tokens(f, logits)
        model.kept.clear()
        del of_model, logits
        return loss
    if model.running.loss == "per-token":
        from peftplan.memory.loss import cross_entropy

        logits = _forward(model)[1]
        f.module = ""
        loss = cross_entropy(f, f.to(logits, "fp32"))
        model.kept.clear()
        return loss
    loss, *outputs = _prepared(model, program)
    if program.trainer.sums_tokens and model.running.loss == "trl-chunked":
        from peftplan.memory.chunked_loss import loss_of_trl

        loss = loss_of_trl(f, *outputs)
    model.kept.clear()
    return loss


def _distilled(model: Model, program: Program, teacher: Model | None) -> Tensor:
    """`GKDTrainer.compute_loss`: the student's logits, those of the teacher without gradients, and the divergence of the two.
    `DistillationTrainer` makes it of hidden states.
    """
    from peftplan.memory.distillation import divergence, divergence_in_tiles

    f, of_models, in_tiles = model.tape, [], model.running.loss == "trl-chunked"
    for number, forward in enumerate(program.forwards):
        runs = _run_by(forward, number, model, teacher)
        with nullcontext() if forward.trains else f.no_grad():
            of_models.append(_forward(runs)[1] if in_tiles else _wide_logits(runs, "softmax"))
    f.module = ""
    assert teacher is not None
    loss = divergence_in_tiles(model, teacher, *of_models) if in_tiles else divergence(f, *of_models)
    for runs in (model, teacher):
        runs.kept.clear()
    return loss


def _prepared(model: Model, program: Program) -> list[Tensor]:
    """The outputs of a model that accelerate prepared: under autocast fp32 copies of those in 16 bits."""
    f = model.tape
    loss, *outputs = _forward(model)
    f.module = ""
    if f.autocast and program.trainer.prepares_model:
        outputs = [f.to(x.detach(), "fp32") if x.dtype in HALF else x for x in outputs]
    return [loss, *outputs]


def _wide_logits(model: Model, scoring: Scoring) -> Tensor:
    """The logits of a model that returns no loss, in fp32, as accelerate returns them where it runs the model under autocast."""
    f = model.tape
    logits = _forward(model)[1]
    f.module = ""
    return logits if scoring == "rows" and not f.autocast else f.to(logits, "fp32")


def _preference_loss(model: Model, program: Program, reference: Model | None) -> Tensor:
    """`compute_loss` of TRL's trainers of preferences: forwards in order, and what they gave stays alive until it returns.

    Source: trl `DPOTrainer._compute_loss`, `KTOTrainer._compute_loss`. Left out: numbers of whole rows, and the metrics.
    """
    from peftplan.memory.chunked_loss import loss_of_rows, sum_of_rows

    f = model.tape
    alive: list[object] = []
    sums: list[Tensor] = []
    labels: dict[str, Tensor] = {}
    for number, forward in enumerate(program.forwards):
        runs = _run_by(forward, number, model, reference)
        if forward.batch or not labels:
            labels[forward.batch] = _labels(f)
        with nullcontext() if forward.trains else f.no_grad():
            outputs = _prepared(runs, program)
            sums.append(sum_of_rows(f, outputs[1]))
        if forward.batch:
            del labels[forward.batch]
        else:
            alive.append(outputs)
        del outputs
    loss = loss_of_rows(f, sums)
    model.kept.clear()
    return loss


def _loss_of_logits(model: Model, program: Program, reference: Model | None, scoring: Scoring) -> Tensor:
    """The same where a forward returns all logits: those that stay until the loss is made, and their copies."""
    from peftplan.memory.chunked_loss import loss_of_rows
    from peftplan.memory.pair_logits import by_kind, mean_logits, scored_rows

    f, by = model.tape, program.trainer
    logits_of: dict[str, Tensor] = {}
    sums: list[Tensor] = []
    last = {forward.of: forward for forward in program.forwards}
    for number, forward in enumerate(program.forwards):
        runs = _run_by(forward, number, model, reference)
        with nullcontext() if forward.trains else f.no_grad():
            logits = _wide_logits(runs, scoring)
            sums.append(scored_rows(f, logits, scoring, count=model.running.batch_size))
        if forward.of in by.keeps_logits and not forward.batch:
            logits_of[forward.of] = logits.detach()
        del logits
        if by.kinds == "after its forwards" and forward is last[forward.of] and forward.of in logits_of:
            logits_of[forward.of] = by_kind(f, logits_of[forward.of])
    if by.kinds != "after its forwards" and logits_of:
        mean_logits(f, logits_of["policy"], copies=by.kinds == "in the log")
    loss = loss_of_rows(f, sums)
    model.kept.clear()
    return loss


def _run_by(forward: Forward, number: int, model: Model, reference: Model | None) -> Model:
    """The model that runs a forward, on the batch of the policy; without a second model it is the policy itself."""
    runs = model if forward.of == "policy" or reference is None else reference
    runs.pass_name, runs.micro_batch, runs.batch = f"/{number}", model.micro_batch, model.batch
    return runs


def _labels(f: Tape) -> Tensor:
    """`input_ids.masked_fill(completion_mask == 0, -100)`."""
    prompt = f.new(("b", "s"), "bool", "eq")
    labels = f.new(("b", "s"), "int64", "masked_fill")
    del prompt
    return labels


def _forward(model: Model) -> list[Tensor]:
    """The loss, and what else the outputs hold."""
    head = head_of(model)
    model.units.enter(ROOT)
    model.units.enter(BACKBONE)
    forward = forward_of(model.arch.model_type, own_modules=model.running.own_modules, own_decoders=model.running.own_decoders)
    hidden = model.units.leave(BACKBONE, forward(model))
    if model.running.own_modules and model.running.loss != "full":  # the loss projects, behind the model
        hidden = model.units.leave(ROOT, hidden)
        model.units.end_forward()
        outputs = [*head(model, hidden)]
    else:
        outputs = [*head(model, hidden), *model.outputs]
        of_model = 1 if model.running.without_loss else 0
        outputs[of_model] = model.units.leave(ROOT, outputs[of_model])
        outputs = model.units.hand_out(outputs)
        model.units.end_forward()
    if model.running.peft_type == "ADALORA" and model.running.loss != "trl-chunked":
        from peftplan.memory.methods.adalora import regularized

        outputs[0] = regularized(model, outputs[0])
    model.outputs.clear()
    model.call_locals.clear()
    if model.running.loss not in ALL_LOGITS:
        model.kept.clear()
    model.tape.end_autocast()
    return outputs
