"""The forwards of a micro batch and its loss, by what the trainer's `compute_loss` holds until it returns.

Source: transformers, trainer.py (`compute_loss`); accelerate, utils/operations.py (`ConvertOutputsToFp32`); trl,
`SFTTrainer.compute_loss` and those that each function names.
"""

from contextlib import nullcontext

from peftplan.job.loss_sizes import OF_FUNCTION, RECEIVED
from peftplan.job.trainer import Forward
from peftplan.job.trainer_words import Scoring
from peftplan.memory.loop_loss import loss_by_loop
from peftplan.memory.model import Model
from peftplan.memory.model_outputs import outputs_of, prepared, wide_logits, widened
from peftplan.memory.program import Program
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

TRIPLE = 3
"""Rows of an example that is a chosen, a rejected and a reference completion."""


def loss_of_batch(model: Model, program: Program, reference: Model | None, outputs: list[Tensor]) -> Tensor:
    """The loss of one micro batch, with the load-balancing loss. `outputs`: those that the loop holds of the micro batch
    before; replaced."""
    loss = _loss_of_batch(model, program, reference, outputs)
    if model.load_loss is not None:
        loss = ops.add(model.tape, loss, ops.scale(model.tape, model.load_loss))
        model.load_loss = None
    return loss


def _loss_of_batch(model: Model, program: Program, reference: Model | None, outputs: list[Tensor]) -> Tensor:
    if model.running.loss == "torchtune-chunked":
        from peftplan.memory.torchtune_loss import chunked_cross_entropy

        loss = chunked_cross_entropy(model.tape, outputs_of(model)[1:])
        model.kept.clear()
        return loss
    if program.trainer.block:
        from peftplan.memory.blocks import loss_of_blocks

        rollouts = program.trainer.rows * sum(forward.trains for forward in program.forwards)
        accumulates = program.accumulation > 1
        by = program.trainer
        return loss_of_blocks(model, block=by.block, rollouts=rollouts, accumulates=accumulates, scores_all=by.scores_documents)
    if program.trainer.embeds:
        return _loss_of_embeddings(model, program)
    if program.trainer.passages is not None:
        from peftplan.memory.retrieval import loss_of_passages

        return loss_of_passages(model)
    if program.trainer.values:
        from peftplan.memory.value_model import loss_of_policy_and_values

        assert reference is not None
        return loss_of_policy_and_values(model, reference, outputs)
    if program.trainer.embeds_rows:
        from peftplan.memory.embedded_rows import loss_of_texts

        return loss_of_texts(model.tape, outputs_of(model)[1])
    if program.trainer.scores_values:
        from peftplan.memory.value_head import loss_of_pairs

        loss = loss_of_pairs(model.tape, *outputs_of(model))
        model.kept.clear()
        return loss
    if program.trainer.sums_rows:
        scoring = program.trainer.scoring
        if scoring is None:
            return _preference_loss(model, program, reference)
        return _loss_of_logits(model, program, reference, scoring, outputs)
    if not program.trainer.drops_outputs:
        return _plain_loss(model, outputs, program)
    loss = _loss_apart(model, program, reference, outputs)
    if model.tape.keeps_graph and model.tape.leaves:
        outputs[:] = [loss]
    return loss


def _loss_of_embeddings(model: Model, program: Program) -> Tensor:
    """`SentenceTransformerTrainer.compute_loss`, which holds the hidden states of every column until the loss is made."""
    from peftplan.memory.embedded_pairs import ranking_loss

    f = model.tape
    alive: list[Tensor] = []
    embeddings: list[Tensor] = []
    for number, _ in enumerate(program.forwards):
        model.pass_name = f"/{number}"
        _, hidden, embedding = outputs_of(model)
        model.kept.clear()
        f.module = ""
        alive.append(hidden.detach())
        wide = f.to(hidden.detach(), "fp32") if f.autocast else None  # accelerate's copy of the outputs
        embeddings.append(embedding)
        del hidden, embedding, wide
    return ranking_loss(f, *embeddings)


def _plain_loss(model: Model, outputs: list[Tensor], program: Program) -> Tensor:
    """`outputs = model(**batch)`: the outputs of the micro batch before live until this forward has returned."""
    before, model.kept = model.kept, []
    loss, *others = outputs_of(model)
    outputs[:] = others or [loss]  # either holds the graph, and with it what its nodes do not release
    del before
    if not program.keep_outputs:
        outputs.clear()
        model.kept.clear()
    return loss


def _loss_apart(model: Model, program: Program, reference: Model | None, outputs: list[Tensor]) -> Tensor:
    """`compute_loss`, which drops the outputs, fp32 copies of them under accelerate's autocast."""
    f = model.tape
    if program.trainer.scoring is not None and model.running.loss == "unsloth":
        from peftplan.memory.unsloth_loss import of_pairs

        return of_pairs(model, wide_logits(model, program.trainer.scoring, copies=program.copies_outputs))
    if program.trainer.scoring is not None and not program.trainer.teaches:
        from peftplan.memory.pair_logits import loss_of_completions, loss_of_pairs, loss_of_shared_row, loss_of_triples

        of_rows = loss_of_triples if program.trainer.rows == TRIPLE else loss_of_pairs
        logits = wide_logits(model, program.trainer.scoring, copies=program.copies_outputs)
        scoring, count = program.trainer.scoring, model.running.batch_size
        if program.trainer.shares_rows:
            return loss_of_shared_row(f, logits, count=count)
        if program.trainer.generates:
            entropies = (model.running.logits_to_keep or 1) - 1 if program.trainer.scores_entropies else 0
            as_they_are = program.trainer.leaves_temperature
            loss = loss_of_completions(f, logits, scoring, count=count, entropies=entropies, as_they_are=as_they_are)
            if model.running.reads_answer:
                from peftplan.memory.answers import with_answers

                del logits
                return with_answers(model, loss)
            return loss
        return of_rows(f, logits, scoring, count=count)
    if program.trainer.teaches and model.running.loss == RECEIVED:
        return loss_by_loop(model, program, outputs, reference)
    if program.trainer.teaches:
        return _distilled(model, program, reference)
    if program.trainer.anchors:
        return _anchored(model, program, reference)
    if program.trainer.loss_apart or program.trainer.weighs_tokens or model.running.loss in OF_FUNCTION:
        return loss_by_loop(model, program, outputs)
    loss, *others = prepared(model, program)
    if program.trainer.sums_tokens and model.running.loss == "trl-chunked":
        from peftplan.memory.chunked_loss import loss_of_trl

        loss = loss_of_trl(f, *others)
    model.kept.clear()
    return loss


def _distilled(model: Model, program: Program, teacher: Model | None) -> Tensor:
    """`GKDTrainer.compute_loss`: the student's logits, those of the teacher without gradients, and the divergence of the two.
    `DistillationTrainer` makes it of hidden states.
    """
    from peftplan.memory.distillation import divergence, divergence_in_parts, divergence_in_tiles

    if model.running.loss == "torchtune-kl":
        from peftplan.memory.torchtune_kd import loss_of_chunks

        with_graph, without = (_run_by(forward, number, model, teacher) for number, forward in enumerate(program.forwards))
        chunks = outputs_of(with_graph)[1:]
        with model.tape.no_grad():
            of_teacher = outputs_of(without)[1:]
        return loss_of_chunks(model.tape, chunks, of_teacher)
    f, of_models, in_tiles = model.tape, [], model.running.loss == "trl-chunked"
    own_loss: Tensor | None = None
    for number, forward in enumerate(program.forwards):
        runs = _run_by(forward, number, model, teacher)
        with nullcontext() if forward.trains else f.no_grad():
            own, logits, *_ = outputs_of(runs)
            if forward.trains and program.trainer.adds_own_loss:
                own_loss = own
            of_models.append(logits if in_tiles else widened(f, logits, program.trainer.scoring or "softmax"))
            del own, logits
    f.module = ""
    assert teacher is not None
    if (at_once := program.trainer.compares_at_once) is not None:
        (parts,) = model.running.loss_facts
        loss = divergence_in_parts(f, *of_models, at_once=at_once, parts=int(parts))
    else:
        loss = divergence_in_tiles(model, teacher, *of_models) if in_tiles else divergence(f, *of_models, beta=program.beta)
    for runs in (model, teacher):
        runs.kept.clear()
    return loss if own_loss is None else ops.add(f, loss, ops.scale(f, own_loss))


def _anchored(model: Model, program: Program, reference: Model | None) -> Tensor:
    """LLaMA-Factory's ASFT: the reference's logits, the model with a loss of its own, which is dropped, and the loss of both."""
    from peftplan.memory.anchored_loss import anchored

    assert reference is not None
    f, (first, second) = model.tape, program.forwards
    with f.no_grad():
        of_reference = prepared(_run_by(first, 0, model, reference), program)
    _own, *outputs = prepared(_run_by(second, 1, model, reference), program)
    loss = anchored(f, outputs[0], of_reference[1])
    for runs in (model, reference):
        runs.kept.clear()
    return loss


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
            if runs.running.loss == "unsloth":
                from peftplan.memory.unsloth_loss import of_hidden_rows

                sums.append(of_hidden_rows(runs))
                continue
            outputs = prepared(runs, program)
            sums.append(sum_of_rows(f, outputs[1]))
        if forward.batch:
            del labels[forward.batch]
        else:
            alive.append(outputs)
        del outputs
    loss = loss_of_rows(f, sums)
    model.kept.clear()
    return loss


def _loss_of_logits(model: Model, program: Program, reference: Model | None, scoring: Scoring, outputs: list[Tensor]) -> Tensor:
    """The same where a forward returns all logits: those that stay until the loss is made, and their copies. `outputs`: the
    reference's, where the loop holds them until it has those of the next micro batch; replaced.
    """
    from peftplan.memory.chunked_loss import loss_of_rows
    from peftplan.memory.pair_logits import by_kind, mean_logits, scored_rows

    f, by = model.tape, program.trainer
    logits_of: dict[str, Tensor] = {}
    sums: list[Tensor] = []
    last = {forward.of: forward for forward in program.forwards}
    for number, forward in enumerate(program.forwards):
        runs = _run_by(forward, number, model, reference)
        with nullcontext() if forward.trains else f.no_grad():
            logits = wide_logits(runs, scoring, copies=program.copies_outputs and forward.trains)
            sums.append(scored_rows(f, logits, scoring, count=model.running.batch_size))
        if forward.of in by.keeps_logits and not forward.batch:
            logits_of[forward.of] = logits.detach()
        if by.reference_lasts and forward.of == "reference":
            outputs[:] = [logits.detach()]
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
