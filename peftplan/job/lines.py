"""What weights, gradients, optimizer states and buffers occupy from step to step, as lines of a ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftplan.dtypes import ITEMSIZE
from peftplan.errors import InputError, MissingError
from peftplan.ledger import Allocation, Category, Ledger, Line, Place
from peftplan.optim import Optimizer, shared_states, states
from peftplan.parameters import Parameter, Parameters
from peftplan.storage import category


def weight_lines(parameters: Parameters) -> Ledger:
    """What the weights and the adapter occupy after loading: categories weights, quant_state and adapter_weights."""
    lines = []
    for p in parameters.all:
        for a in p.allocations:
            name = p.name if a.name == "weight" else f"{p.name.removesuffix('.weight')}.{a.name}"
            kind: Category = "adapter_weights" if p.owner == "adapter" else category(a.name)
            lines.append(Line(name, kind, a.dtype, a.dims, p.copies, p.source, a.place))
    lines += [Line(a.name, "quant_state", a.dtype, a.dims, 1, "one per process", a.place) for a in parameters.shared]
    return Ledger(tuple(lines))


def buffer_lines(parameters: Parameters) -> Ledger:
    """What the registered buffers occupy."""
    return Ledger(
        tuple(
            Line(p.name, "buffers", a.dtype, a.dims, p.copies, p.source, a.place)
            for p in parameters.buffers
            for a in p.allocations
        )
    )


def gradient_lines(parameters: Parameters, optimizer: Optimizer) -> Ledger:
    """`.grad` of every trainable parameter, in its own shape and dtype, as all of them live when backward ends.

    An optimizer that steps inside backward (LOMO, layer-wise GaLore) frees each gradient at once: then only the largest counts.
    """
    source = "torch: AccumulateGrad keeps the parameter's dtype"
    trained = [p for p in parameters.all if p.trainable]
    if optimizer.step_implementation == "in-backward" and trained:
        largest = max(trained, key=lambda p: ITEMSIZE[p.dtype] * p.numel)
        source = f"{optimizer.cls} steps inside backward: one gradient at a time, the largest counts"
        trained = [largest._replace(copies=1)]
    return Ledger(
        tuple(Line(f"{p.name}.grad", "gradients", p.dtype, p.shape, p.copies, source, _place(p) or "device") for p in trained)
    )


def optimizer_lines(
    parameters: Parameters,
    optimizer: Optimizer,
    optim_args: Mapping[str, str],
    *,
    by_trainer: bool,
    target_modules: tuple[str, ...] | None,
) -> Ledger:
    """The optimizer's states after its first step, per trainable parameter, and what it holds once.

    `by_trainer`: transformers' Trainer makes the optimizer, which keeps 32-bit states for embeddings under 8-bit optimizers.
    `target_modules` are `optim_target_modules`, which GaLore and APOLLO need.
    """
    if optimizer.low_rank and not target_modules:
        raise MissingError("optim_target_modules", f"{optimizer.name} needs the names of the modules to project")
    if target_modules and any(char.isdigit() for target in target_modules for char in target):
        raise InputError(
            "optim_target_modules", list(target_modules), "accepted: names that select the same modules in every layer"
        )
    lines: list[Line] = []
    every: list[Allocation] = []
    source = optimizer.source
    for p in (p for p in parameters.all if p.trainable or p.rests or optimizer.states_for_frozen):
        of_one = states(
            optimizer,
            shape=p.shape,
            dtype=p.dtype,
            name=p.name,
            in_embedding=p.in_embedding and by_trainer,
            in_target=is_target(p, target_modules or ()),
            frozen=not (p.trainable or p.rests),
            optim_args=optim_args,
        )
        every += of_one
        beside = _place(p)
        lines += [
            Line(f"{p.name}.{a.name}", "optimizer_states", a.dtype, a.dims, p.copies, source, beside or a.place) for a in of_one
        ]
    once = shared_states(optimizer, states=every)
    lines += [Line(a.name, "optimizer_states", a.dtype, a.dims, 1, source, a.place) for a in once]
    return Ledger(tuple(lines))


def is_target(p: Parameter, target_modules: Iterable[str]) -> bool:
    """Whether `optim_target_modules` selects a parameter."""
    return p.is_linear and any(t == "all-linear" or t in p.name for t in target_modules)


def projected_whole(built: Parameters, shards: Parameters, targets: tuple[str, ...]) -> Parameters:
    """What GaLore has states of under FSDP2: torch gathers a gradient to decompose it, and each rank has all of what follows
    (torch, distributed/tensor/_ops/_math_ops.py, `linalg_replicate_strategy`)."""
    pairs = zip(built.all, shards.all, strict=True)
    return shards._replace(all=tuple(own._replace(shape=p.shape) if is_target(p, targets) else own for p, own in pairs))


def _place(p: Parameter) -> Place | None:
    """The host if a weight is offloaded to it: its gradient and states are there too; else None."""
    for a in p.allocations:
        if a.place != "host":
            return None
    return "host"


def sensitivity_lines(parameters: Parameters) -> Ledger:
    """What AdaLoRA's rank allocator keeps of each of its parameters (peft, tuners/adalora/layer.py `RankAllocator`)."""
    if not any(p.name.endswith(".lora_E") for p in parameters.all):
        return Ledger(())
    kinds = ("ipt", "exp_avg_ipt", "exp_avg_unc")
    trained = [p for p in parameters.all if p.owner == "adapter" and p.trainable and ".lora_" in p.name]
    source = "peft: RankAllocator.update_ipt"
    return Ledger(
        tuple(Line(f"{p.name}.{kind}", "optimizer_states", p.dtype, p.shape, p.copies, source) for p in trained for kind in kinds)
    )
