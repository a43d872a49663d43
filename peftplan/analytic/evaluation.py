"""An evaluation between steps: a batch of rows goes through the model and its loss without gradients, beside what lasts.

Nothing is recomputed, no module drops anything, and the gradients of the step before are gone. Source: transformers, trainer.py
(`_maybe_log_save_evaluate`, `evaluation_loop`, `prediction_step`); trl, `SFTTrainer.prediction_step`. Left out: what
`compute_metrics` keeps, which is the logits of all rows.
"""

from collections import OrderedDict
from dataclasses import replace

from peftplan.analytic.compiled import key_of_step
from peftplan.analytic.generation import Generation, ending
from peftplan.analytic.reference_model import reference_of
from peftplan.analytic.running import loss_sizes
from peftplan.analytic.sizes import sizes
from peftplan.analytic.steady import prepared
from peftplan.arch.modules import NO_DROPOUT
from peftplan.job.evaluating import REHEARSED, without_formula
from peftplan.job.inventory import Inventory, of_any_device, on_rank
from peftplan.memory.step import evaluation_step
from peftplan.memory.timeline import timeline
from peftplan.memory.zero3_modules import Gathering
from peftplan.methods.adaptation import MethodConfig
from peftplan.scans import no_scans

EVALUATE = "evaluate"
KEPT = 64
"""The last evaluations."""
_RECORDED: "OrderedDict[tuple[object, ...], tuple[Generation, int]]" = OrderedDict()
"""What decides the operations of an evaluation → its events at all sizes, and the virtual tokens of its rows."""


def evaluation_of(inventory: Inventory, *, compute_capability: str) -> Generation | None:
    """What follows a job's step; None where nothing is evaluated, or it has no formula."""
    if inventory.job.setup.eval_batch_size is None or without_formula(inventory.job) is not None:
        return None
    inventory = on_rank(inventory, 0) if of_any_device(inventory) else inventory  # beside what lasts, all ranks hold the same
    under_zero3 = inventory.job.distributed is not None and inventory.job.distributed.strategy == "zero3"
    trained, inventory = inventory if under_zero3 else None, _in_evaluation(inventory)
    job, holding = inventory.job, inventory.holding
    of_rank = holding and (holding.device, holding.rank)
    of_order = trained and key_of_step(trained.job, compute_capability)
    key = of_rank, key_of_step(job, compute_capability), job.multiprocessors, of_order
    if key not in _RECORDED:
        with no_scans():
            _RECORDED[key] = _recorded(inventory, trained, compute_capability)
        if len(_RECORDED) > KEPT:
            _RECORDED.popitem(last=False)
    recorded, virtual_tokens = _RECORDED[key]
    loss = loss_sizes(job)
    named = sizes(job.setup.rows, loss.row(job.setup.seq_len), virtual_tokens=virtual_tokens, loss=loss)
    return recorded._replace(sizes=recorded.timeline.with_derived(named))


def _in_evaluation(inventory: Inventory) -> Inventory:
    """The job as an evaluation runs it."""
    job = inventory.job
    skips = REHEARSED[job.setup.trainer].skips_logits and not job.script.makes_logits
    loss = "full" if job.setup.loss == "liger" and not skips else job.setup.loss  # which leaves logits out in training alone
    rows = {"batch_size": job.setup.eval_batch_size, "loss": loss}
    changed = {**rows, "gradient_checkpointing": False, "noisy_embeddings": None}
    return inventory._replace(job=job._replace(setup=job.setup.model_copy(update=changed)))


def _recorded(inventory: Inventory, trained: Inventory | None, compute_capability: str) -> tuple[Generation, int]:
    """`trained`: under ZeRO-3 the job whose steps leave the order in which modules gather. What a batch keeps for a backward that
    never comes, the next batch finds: the second one stands for all."""
    job, before = inventory.job, None
    silent = inventory._replace(job=job._replace(architecture=replace(job.architecture, dropout=NO_DROPOUT)))
    new_model, program = prepared(silent, compute_capability=compute_capability)
    model = new_model()
    model.running = model.running._replace(config=_without_dropout(model.running.config))
    if job.distributed is None:
        reference = reference_of(job, model)
    else:
        from peftplan.analytic import first_steps, ranks

        if trained is not None:
            step = prepared(trained, compute_capability=compute_capability)
            before = first_steps.left_by_steps(trained, *step, compute_capability=compute_capability)
        program = ranks.divided(silent, model, program, before)._replace(copies_outputs=False)  # DDP's wrapper is not called
        reference = ranks.reference_on_rank(job, model, before)
    for _ in range(1 if trained is None else 2):
        evaluation_step(model, program._replace(collects=False), reference)
    if isinstance(model.units, Gathering):  # the next backward releases all
        model.units.coordinator.release_all(model.units.sharded.values())
    events = timeline(model.tape, model.stacks, vocab=job.architecture.vocab_size)
    return ending(events, {}, phase=EVALUATE), model.virtual_tokens


def _without_dropout(config: MethodConfig | None) -> MethodConfig | None:
    """The method's config in `eval()`."""
    fields = () if config is None else type(config).model_fields
    dropped = [name for name in fields if name.endswith("dropout") and getattr(config, name)]
    return config.model_copy(update=dict.fromkeys(dropped, 0.0)) if config is not None and dropped else config
