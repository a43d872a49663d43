"""Step programs: the loop around the model decides what is alive when.

Source: transformers, trainer.py (`training_step`); accelerate. The same programs as `trace.steps` runs; the loss of a micro batch
is in `compute_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.batch import batch_of, shared
from peftplan.memory.compute_loss import loss_of_batch
from peftplan.memory.model import Model
from peftplan.memory.optimizer import optimizer_step
from peftplan.memory.program import Program
from peftplan.memory.scaler import Scaler
from peftplan.memory.units import ONE_GPU
from peftplan.memory.widened import widened_gradients
from peftplan.tape.tensors import Tensor

if TYPE_CHECKING:
    from peftplan.distributed.fsdp2 import Fsdp2

MOST_MICRO_BATCHES = 8
"""How many are run of gradients that take segments of their own. Left out: what later ones still move (Gemma 2 of 46 layers, 16
micro batches: nothing; Gemma 2 9B: 0.04 % of the reserved bytes)."""


def steady_step(model: Model, program: Program, reference: Model | None = None) -> None:
    """One steady optimizer step. `reference`: the model that the policy is compared with, where a forward runs it."""
    f = model.tape
    f.keeps_graph = program.trainer.weighs_tokens
    kernels = model.running.kernels
    if kernels.activations is not None:
        from peftplan.tape.grouped import Grouped
        from peftplan.tape.offloaded import Offloaded

        f.offloaded = Grouped(f) if kernels.activations.by_layer else Offloaded(f)
    if program.schedule is not None:
        program.schedule.begin()
    elif kernels.decoder is not None or kernels.checkpoint is not None or model.running.own_decoders:
        from peftplan.memory.lasting import kept_on_card

        kept_on_card(model)
    teacher = None if reference is None else _sharded(reference)
    if teacher is not None:
        teacher.stay()
    _fetch(model, program)
    if program.keep_gradients:
        model.keep_gradients()
    stepped = model.parameters.all if program.shards is None else program.shards
    rolled_out: list[Tensor] = []
    if program.trainer.values:
        from peftplan.memory.value_model import logits_of_rollout, statistics

        assert reference is not None
        stepped = stepped if program.steps_in_backward else (*stepped, *reference.parameters.all)  # DeepSpeed's groups have both
        rolled_out.append(logits_of_rollout(f, model, program.accumulation))
    old_gradients: list[Tensor] = []
    if program.holds_gradients:
        old_gradients = [f.many(p.shape, p.dtype, f"{p.name}.grad of the step before", p.copies) for p in stepped if p.trainable]
    scaler = Scaler(f) if program.scales and program.trainer.prepares_model else None
    outputs: list[Tensor] = []
    last = _micro_batches(model, program) - 1
    for number in range(last + 1):
        model.micro_batch = number
        if number and not program.collects:
            _fetch(model, program)
        if program.schedule is not None:
            program.schedule.run(f, model.batch, outputs, last=number == last)
            loss_in_step = None
            continue
        f.segment = abs(f.segment) + 1  # forward code again, after the backward of the micro batch before
        f.mark("forward")
        if program.sent and not number:
            from peftplan.memory.synced import send_on_tape

            send_on_tape(f, program.sent)
        shares = shared(model)
        loss = loss_of_batch(model, program, reference, outputs)
        f.mark("backward")
        scaled = loss if scaler is None else scaler.scaled(f, loss)
        model.units.begin_backward(syncs=program.syncs_each_batch or number == last)
        f.backward(scaled)
        model.handed_on.clear()
        model.units.end_backward()
        loss_in_step = loss if number == last and program.steps_in_backward else None
        del loss, scaled, shares
        if model.running.ulysses > 1:
            del model.batch["shift_labels"]
        if program.trainer.values and number < last:
            statistics(f, outputs)
        if program.frees_outputs:
            outputs.clear()
            model.kept.clear()
    model.units.before_step()
    old_gradients.clear()
    f.mark("step")
    f.module = ""
    if scaler is not None:
        with_gradients = model.with_gradients() if program.shards is None else program.shards
        scaler.unscale(f, {p.dtype for p in with_gradients if p.trainable}, takes_fp16=program.unscales_fp16)
    idle = model.units.idle(model.idle())
    model.forget_gradients(idle)
    trained = [p for p in stepped if p.trainable and p.name not in idle | program.left_alone]
    freezes_a = bool(getattr(model.running.config, "freeze_a", False))
    clips = program.trainer.clips_gradients and not program.steps_in_backward
    widened = widened_gradients(model) if program.optimizer.name == "badam" else []
    for group in model.units.groups(trained):
        optimizer_step(
            f, program.optimizer, group, clips=clips, freezes_a=freezes_a, projected=program.projected, ranks=model.units.ranks
        )
    del widened
    if model.running.peft_type == "ADALORA" and program.updates_ranks:
        from peftplan.memory.methods.adalora import allocate

        allocate(model)
    del loss_in_step
    outputs.clear()
    rolled_out.clear()
    model.kept.clear()
    model.lingering.clear()
    if teacher is not None:
        teacher.go()


def evaluation_step(model: Model, program: Program, reference: Model | None = None) -> None:
    """One batch of an evaluation: the forward and its loss, without gradients (transformers, `Trainer.prediction_step`)."""
    f, outputs = model.tape, list[Tensor]()
    f.mark("forward")
    with f.no_grad():
        _fetch(model, program)
        loss = loss_of_batch(model, program, reference, outputs)
    f.mark("backward")
    del loss
    outputs.clear()
    model.kept.clear()
    model.batch.clear()


def _sharded(reference: Model) -> Fsdp2 | None:
    """The units of a second model that FSDP2 shards."""
    from peftplan.distributed.fsdp2 import Fsdp2

    return reference.units if isinstance(reference.units, Fsdp2) else None


def _fetch(model: Model, program: Program) -> None:
    """Free the batch, and put the next one on the device, or those of all micro batches."""
    f, others = model.tape, program.accumulation - 1
    model.batch.clear()
    model.batch.update(_batch(model, program))
    if program.schedule is not None:
        f.counts.update(dict.fromkeys((x.storage.number for x in model.batch.values() if x.storage), program.schedule.chunks))
    if program.collects:
        if others:
            model.other_batches = [f.many(x.dims, x.dtype, name, others) for name, x in model.batch.items()]
        f.collected = {x.storage.number for x in (*model.batch.values(), *model.other_batches) if x.storage is not None}


def _batch(model: Model, program: Program) -> dict[str, Tensor]:
    """What the collator and the trainer put into a batch."""
    f, batch = model.tape, batch_of(model)
    if program.trainer.passages == "apart":
        from peftplan.memory.retrieval import batch_of_texts

        return batch_of_texts(f)
    if program.trainer.embeds:
        del batch["labels"]
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if model.arch.model_type == "bert" else ()))
        for number, name in ((number, name) for number, _ in enumerate(program.forwards) for name in names):
            batch[name if not number else f"{number}_{name}"] = f.new(("b", "s"), "int64", name)
        return batch
    if program.trainer.always_masks and "attention_mask" not in batch:
        batch["attention_mask"] = f.new(("b", "s"), "int64", "attention_mask")
    if program.trainer.packs:
        for name, dtype in (("position_ids", "int64"), ("seq_idx", "int32")):
            batch[name] = f.new(("b", "s"), dtype, name)
    if program.trainer.weighs_tokens:
        for name, dtype in (("position_ids", "int64"), ("loss_weights", "fp32")):
            batch[name] = f.new(("b", "s"), dtype, name)
    for rows in dict.fromkeys(forward.batch for forward in program.forwards if forward.batch):
        for name in ("input_ids", "attention_mask", "completion_mask"):
            batch[f"{rows}{name}"] = f.new(("b", "s"), "int64", f"{rows}{name}")
    return batch


def _micro_batches(model: Model, program: Program) -> int:
    """How many micro batches are run. Large segments of gradients that are added to others find other room each time."""
    if program.keep_gradients and not program.keep_outputs:  # every micro batch meets what the first does
        return 1
    if program.accumulation <= model.units.micro_batches or model.units is not ONE_GPU:
        return min(program.accumulation, model.units.micro_batches)
    from peftplan.allocator.config import MIN_LARGE_ALLOC

    large = any(p.trainable and p.numel * ITEMSIZE[p.dtype] >= MIN_LARGE_ALLOC for p in model.parameters.all)
    return min(program.accumulation, MOST_MICRO_BATCHES if large else model.units.micro_batches)
