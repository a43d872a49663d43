"""Optimizers that the libraries refuse under a strategy, each with the line that raises."""

from __future__ import annotations

from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import UNDECAYED
from peftplan.errors import RefusedError
from peftplan.job.setup import Setup
from peftplan.methods.adaptation import Adaptation
from peftplan.optim import OPTIMIZERS, Optimizer, parse_optim
from peftplan.versions import named

ZERO = ("zero1", "zero2", "zero3")
FSDP = ("fsdp1", "fsdp2")
LION = ("lion_32bit", "paged_lion_32bit")
_THREE_BETAS = "ValueError: too many values to unpack (expected 2) (deepspeed, ops/adam/cpu_adam.py:168)"
_TWO_EPS = "TypeError: adam_update(): incompatible function arguments, as eps is a pair (deepspeed, ops/adam/cpu_adam.py:170)"
WITH_OTHER_GROUPS = {
    **{name: _THREE_BETAS for name in OPTIMIZERS if "ademamix" in name},
    **dict.fromkeys(("adafactor", "galore_adafactor"), _TWO_EPS),
}
"""Optimizers whose groups of parameters DeepSpeedCPUAdam does not understand in its first step, and what it raises."""
FLATTENING = (*ZERO, "fsdp1")
"""Strategies whose optimizer steps over vectors: parts of flattened parameters."""


def stepped_by_deepspeed(setup: Setup, distributed: Distributed) -> Setup:
    """The setup with DeepSpeed's own optimizer: where its config names Adam, and where accelerate replaces any that Trainer made
    for a step on the host (accelerator.py:2383, utils/deepspeed.py, `map_pytorch_optim_to_deepspeed`).

    Raises RefusedError for Adagrad, whose replacement DeepSpeed refuses, and for `WITH_OTHER_GROUPS`.
    """
    offloads = distributed.offload_optimizer not in (None, "none")
    replaces = offloads and distributed.zero_force_ds_cpu_optimizer is not False and setup.by.prepares_model
    if distributed.strategy not in ZERO or not (distributed.deepspeed_optimizer or replaces):
        return setup
    name = parse_optim(str(setup.optim)).name
    if not distributed.deepspeed_optimizer and name == "adagrad":
        raise RefusedError(
            f"optim: {named('accelerate')} makes DeepSpeedCPUAdagrad of adagrad with offload_optimizer, which DeepSpeed refuses: "
            "ZeRORuntimeException: You are using ZeRO-Offload with a client provided optimizer (runtime/engine.py:2346); "
            "accepted: another optimizer, or zero_force_ds_cpu_optimizer false"
        )
    if not distributed.deepspeed_optimizer and name in WITH_OTHER_GROUPS:
        raise RefusedError(
            f"optim: {named('accelerate')} makes DeepSpeedCPUAdam of {name} with offload_optimizer, and hands it the parameter "
            f"groups of {name}: {WITH_OTHER_GROUPS[name]}; accepted: another optimizer, or zero_force_ds_cpu_optimizer false"
        )
    on_host = "deepspeed_cpu_lion" if name in LION and not distributed.deepspeed_optimizer else "deepspeed_cpu_adam"
    return setup.model_copy(update={"optim": on_host if offloads else "deepspeed_adam"})


def check_in_backward(distributed: Distributed, setup: Setup) -> None:
    """Raise RefusedError for an optimizer that steps in backward, which Trainer makes, or hands a learning rate to, whatever
    DeepSpeed puts in its place."""
    optimizer, strategy, own = parse_optim(str(setup.optim)), distributed.strategy, distributed.deepspeed_optimizer
    if optimizer.low_rank and optimizer.step_implementation == "in-backward" and strategy != "device-map" and not own:
        raise RefusedError(
            f"optim: {named('transformers')} refuses {optimizer.name} on several ranks: NotImplementedError: Layer-wise "
            f"{optimizer.name} does not support DDP at this time (trainer_optimizer.py:117); accepted: an optimizer that is not "
            "layerwise"
        )
    if optimizer.package == "lomo-optim" and strategy in ("zero0", *ZERO):
        raise RefusedError(
            f"optim: {optimizer.name} fails in the first backward of {distributed.facts.called}: Trainer hands its learning rate "
            "to accelerate (trainer.py:2105), which hands it on: TypeError: DeepSpeedEngine.backward() got an unexpected keyword "
            "argument 'learning_rate' (accelerator.py:2853); accepted: one GPU, ddp"
        )


def check_optimizer(distributed: Distributed, setup: Setup, adaptation: Adaptation) -> None:
    """Raise RefusedError for an optimizer whose constructor or first step fails under a strategy."""
    optimizer, strategy = parse_optim(str(setup.optim)), distributed.strategy
    if distributed.deepspeed_optimizer:
        return
    trained = [t for t in adaptation.added if t.trainable]
    shapes = [*(t.shape for t in trained), *(p.shape for p in adaptation.trained)]
    matrices = any(len(shape) > 1 for shape in shapes)
    names = [*(t.name for t in trained), *(f"{p.module}.{p.param}" for p in adaptation.trained)]
    undecayed = (bool(UNDECAYED.search(name)) for name in names)
    if optimizer.low_rank and strategy in FLATTENING:
        raise RefusedError(
            f"optim: {optimizer.name} fails in the first step of {distributed.facts.called}, where an optimizer steps over parts "
            f"of flattened parameters: {optimizer.package} projects matrices alone: IndexError: tuple index out of range; "
            "accepted: ddp"
        )
    if optimizer.package == "apollo-torch" and strategy == "fsdp2":
        raise RefusedError(
            f"optim: {optimizer.name} fails in the first step of FSDP2: its constructor gives each parameter a seed, and "
            "accelerate puts DTensors in their place afterwards: KeyError: 'seed' (apollo-torch, apollo.py:92); accepted: ddp"
        )
    if optimizer.name == "galore_adamw_8bit" and strategy == "fsdp2":
        raise RefusedError(
            f"optim: {optimizer.name} fails in the first step of FSDP2: what trains is a DTensor, and the tables of bitsandbytes "
            "are not: RuntimeError: bitsandbytes.optimizer_update_8bit_blockwise.default got mixed torch.Tensor and DTensor "
            "(bitsandbytes, functional.py:1192); accepted: ddp"
        )
    waits = setup.gradient_accumulation_steps > 1 and not distributed.sync_each_batch
    if optimizer.name == "lomo" and strategy == "fsdp1" and waits:
        raise RefusedError(
            "optim: lomo steps after each backward, and FSDP1 leaves gradients whole until the last micro batch: "
            "RuntimeError: The size of tensor a must match the size of tensor b (lomo-optim, lomo.py:128); accepted: "
            "--gradient-accumulation-steps 1, fsdp2"
        )
    if optimizer.name == "adalomo" and strategy == "fsdp2":
        raise RefusedError(
            "optim: adalomo fails in the first backward of FSDP2: its second moments are plain tensors, and gradients DTensors: "
            "RuntimeError: aten.add_.Tensor got mixed torch.Tensor and DTensor (lomo-optim, adalomo.py:174); accepted: lomo, ddp"
        )
    if optimizer.name in ("adafactor", "galore_adafactor") and strategy == "fsdp2" and matrices:
        line, others = ("adafactor.py:235", "") if optimizer.low_rank else ("optimization.py", ", zero1, zero2 or zero3")
        raise RefusedError(
            f"optim: {optimizer.name} fails in the first step of FSDP2: its factored second moment is a plain tensor, and "
            "gradients are DTensors: RuntimeError: aten.add_.Tensor got mixed torch.Tensor and DTensor "
            f"({optimizer.package}, {line}); accepted: ddp{others}"
        )
    if optimizer.name == "adagrad" and strategy in ZERO and setup.by.makes_optimizer and len(set(undecayed)) > 1:
        raise RefusedError(
            f"optim: adagrad fails in the first step of {distributed.facts.called}: DeepSpeed makes it anew with one group of "
            "all partitions (runtime/zero/stage_1_and_2.py:947, stage3.py:1358), and Trainer's second group, of norms and "
            "biases, is missing: IndexError: list index out of range; accepted: an adapter without norms and biases, ddp or fsdp2"
        )
    if strategy in FSDP and distributed.offload_params == "cpu" and (why := _moved_to_gpu(optimizer, setup)) is not None:
        raise RefusedError(
            f"optim: {optimizer.name} fails in the first step of {distributed.facts.called} with offload_params, which keeps "
            f"parameters on the host: {why}; accepted: offload_params none, adamw_torch_fused"
        )
    if strategy == "fsdp2" and optimizer.package == "bitsandbytes":
        raise RefusedError(
            f"optim: {setup.optim} fails in the first step of FSDP2: what trains is a DTensor, for which the operators of "
            "bitsandbytes have no sharding strategy (NotImplementedError); accepted: --optim adamw_torch_8bit, or zero2 and zero3"
        )


def _moved_to_gpu(optimizer: Optimizer, setup: Setup) -> str | None:
    """Why an optimizer has a part on the GPU that its step needs on the host, and what raises; None if it has none."""
    if optimizer.package == "torchao" and setup.by.prepares_model:
        return (
            f"{named('accelerate')} moves its learning rate, a tensor, to the GPU (optimizer.py:74): TorchRuntimeError: Tensor "
            "device mismatch (torchao, optim/adam.py:183)"
        )
    if optimizer.name == "adalomo":
        return (
            "its second moments are on the GPU (lomo-optim, adalomo.py:93): RuntimeError: Expected all tensors to be on the same "
            "device (adalomo.py:185)"
        )
    return None
