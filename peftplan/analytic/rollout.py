"""What trl's older online trainers keep beside the models before a step, as far as it may be most.

b completions of a step, s tokens, n of a completion, v vocabulary.

NashMDTrainer, for a token: both models' logits of all tokens before it, in the dtype of the weights, the mixture's two terms and
their sum, and the scores of a token. PPOTrainer: the scores of all tokens beside the cache, stacked, and padded; then the
reference's forward, with its cache and the hidden states of its layers. The logits of the rollout before live until the next
ones are there. Value and reward model keep no cache and no logits, so that they need less.

Source: trl before 1.16, experimental/nash_md/nash_md_trainer.py (`GeometricMixtureWrapper.forward`), experimental/ppo/
ppo_trainer.py (`batch_generation`, `train`); transformers, generation/utils.py (`_sample`). `rows_at_once` completions are
written and scored at once.
"""

from collections.abc import Iterator, Mapping

from peftplan.analytic.running import running_of
from peftplan.analytic.sizes import sizes
from peftplan.distributed.zero import largest_rank, slots_of
from peftplan.job.inventory import Inventory
from peftplan.job.loss_sizes import LossSizes
from peftplan.job.requirements import rows_at_once
from peftplan.memory.heads import logits_of
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.timeline import Timeline, timeline
from peftplan.methods.adaptation import Adaptation
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Tensor


def mixed(inventory: Inventory) -> Timeline:
    """The last token that policy and reference write together, beside the gradients of the micro batches before."""
    setup, vocab = inventory.job.setup, inventory.job.architecture.vocab_size or 0
    f = Tape()
    f.mark("forward")
    gradients = _gradients(f, inventory) if setup.gradient_accumulation_steps > 1 else []
    dims: Dims = (setup.generation_rows, setup.seq_len - 1, vocab)
    scores = f.many((setup.generation_rows, vocab), "fp32", "scores", 3)
    logits = f.many(dims, setup.dtype, "logits of both models", 2)
    mixture = f.many(dims, setup.dtype, "terms of the mixture and their sum", 3)
    del gradients, scores, logits, mixture
    f.mark("backward")
    return timeline(f, {}, vocab=None)


def _gradients(f: Tape, inventory: Inventory) -> list[Tensor]:
    """Those of all weights; under ZeRO-2 those of which the rank has a part, in one tensor."""
    parameters, distributed, holding = inventory.parameters, inventory.job.distributed, inventory.holding
    if distributed is None or holding is None:
        return [f.many(p.shape, p.dtype, f"{p.name}.grad", p.copies) for p in parameters.all if p.trainable]
    slots = slots_of(parameters, distributed)
    rank = largest_rank(slots) if holding.rank is None else holding.rank
    reaching = sum(slot.numel * (slot.of_rank(rank) > 0) for slot in slots.values())
    return [f.new((reaching,), inventory.job.setup.dtype, "gradients of the rank's partition")]


def rolled_out(inventory: Inventory, compute_capability: str) -> Iterator[tuple[Timeline, Mapping[str, int]]]:
    """The scores of completions, as they are padded; the forward of the reference."""
    setup, vocab = inventory.job.setup, inventory.job.architecture.vocab_size or 0
    drawn: Dims = (setup.generation_rows, setup.max_completion_length or 0, vocab)
    f = Tape()
    f.mark("forward")
    logits = f.many(drawn, "fp32", "logits of the rollout, the one before, and as they are padded", 3)
    del logits
    f.mark("backward")
    yield timeline(f, {}, vocab=None), {}
    yield _referred(inventory, compute_capability, drawn)


def _referred(inventory: Inventory, compute_capability: str, drawn: Dims) -> tuple[Timeline, Mapping[str, int]]:
    job, parameters, *_ = inventory
    setup, arch, rows = job.setup, job.architecture, rows_at_once(job.setup)
    running = running_of(job, compute_capability)._replace(autocast=None, loss="full", loss_facts=(), batch_size=rows)
    frozen = parameters._replace(all=tuple(p._replace(trainable=False) for p in parameters.all))
    model = Model(Tape(several=rows > 1), arch, frozen, Adaptation(), running, None)
    f = model.tape
    f.mark("forward")
    with f.no_grad():
        of_rollout = f.new(drawn, "fp32", "logits of the rollout")
        for name, dtype in (("input_ids", "int64"), ("attention_mask", "bool"), ("position_ids", "int64")):
            model.batch[name] = f.new(("b", "s"), dtype, name)
        logits = logits_of(model, forward_of(arch.model_type)(model))
        exponentials = f.new(drawn[1:], "fp32", "exp")
        del exponentials, logits, of_rollout
        f.mark("backward")
        model.kept.clear()
        model.batch.clear()
    read = timeline(f, model.stacks, vocab=arch.vocab_size)
    loss = LossSizes("full", 0, 0, 0, prompted=False)
    return read, read.with_derived(sizes(rows, setup.seq_len, virtual_tokens=0, loss=loss))
