"""What Unsloth's GRPO does before a step where completions are scored without gradients: by a reference, or by the policy.

All completions of a step are read at once, in one row without padding where they are several; the hidden states of every layer
are alive until the forward ends. Left out: that a card with less room scores them in parts; that a reference has no adapter.
Source: unsloth 2026.10.9, models/rl_replacements.py:3836 (`_get_per_token_logps_and_entropies`, sequence packing) and
models/rl.py:2089.
"""

from collections.abc import Mapping

from peftplan.analytic.running import loss_sizes, running_of
from peftplan.analytic.sizes import sizes
from peftplan.job.inventory import Inventory
from peftplan.job.kernels import kernels_of
from peftplan.memory.lasting import kept_on_card
from peftplan.memory.methods import adapter_of
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.timeline import Timeline, timeline
from peftplan.memory.unsloth_loss import of_completions
from peftplan.tape.tape import Tape


def scored(inventory: Inventory, compute_capability: str) -> tuple[Timeline, Mapping[str, int]]:
    """The events of scoring the completions of a step, and the sizes at which they are evaluated."""
    job, parameters, *_ = inventory
    setup, arch, rows, loss = job.setup, job.architecture, job.setup.scored_rows, loss_sizes(job)
    running = running_of(job, compute_capability)
    kernels = running.kernels._replace(padding_free=kernels_of(("unsloth.padding_free",)).padding_free if rows > 1 else None)
    facts = loss.facts(rows, loss.length(setup.seq_len))
    running = running._replace(batch_size=rows, kernels=kernels, loss_facts=facts, checkpointing=False, scored_rows=0)
    adapter = adapter_of(job.method and job.method.peft_type)
    model = Model(Tape(autocast=running.autocast), arch, parameters, job.adaptation, running, job.quant, adapter=adapter)
    f = model.tape
    f.mark("forward")
    kept_on_card(model)
    with f.no_grad():
        for name in ("input_ids", "position_ids"):
            model.batch[name] = f.new(("b", "s"), "int64", name)
        hidden = forward_of(arch.model_type)(model)
        of_completions(model, hidden)
        del hidden
        f.end_autocast()
    f.mark("backward")
    model.kept.clear()
    model.batch.clear()
    of_all = timeline(f, model.stacks, vocab=arch.vocab_size)
    return of_all, of_all.with_derived(sizes(rows, setup.seq_len, virtual_tokens=0, loss=loss))
