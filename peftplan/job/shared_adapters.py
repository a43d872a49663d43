"""Adapters that the libraries refuse beside a strategy, each with the line that raises."""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.distributed.layout import ACCELERATE
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.tensor_parallel import style_of
from peftplan.distributed.wrapped import absent_class
from peftplan.distributed.zero import by_tensor
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.errors import RefusedError
from peftplan.job.setup import Setup
from peftplan.methods.adaptation import Adaptation, AddedTensor
from peftplan.methods.bottleneck import is_bottleneck
from peftplan.versions import FSDP2_TAIL_APART, named


def check_adapter(distributed: Distributed, setup: Setup, architecture: Architecture, adaptation: Adaptation) -> None:
    """Raise RefusedError for a LoRA that peft makes too narrow beside a divided layer (peft, tuners/tuners_utils.py,
    `_get_in_out_features`), and for Liger's loss where accelerate finds no final norm in the wrapped model
    (`_find_final_norm`): the head is a unit of its own then, which no call of it gathers."""
    apart = setup.by.layout is ACCELERATE and not setup.by.own_fsdp2 and not FSDP2_TAIL_APART.after(distributed.accelerate)
    if distributed.strategy == "fsdp2" and adaptation.added and setup.loss == "liger" and apart:
        raise RefusedError(
            f"loss: liger reads the head's shard under FSDP2 with an adapter, since {named('accelerate')} makes a unit of the "
            "head alone: RuntimeError: aten.mm.out got mixed torch.Tensor and DTensor (liger-kernel, "
            "ops/fused_linear_cross_entropy.py:164); accepted: --loss full, or zero3"
        )
    if distributed.find_unused_parameters and not distributed.static_graph and setup.gradient_checkpointing:
        _check_unused(setup, adaptation)
    if distributed.strategy == "fsdp1":
        _check_flat(distributed, setup, architecture, adaptation)
    _check_shards(distributed, setup, adaptation)
    of_lora = any(".lora_A." in tensor.name for tensor in adaptation.added)
    for module in adaptation.matched if distributed.strategy == "tp" and of_lora else ():
        if (style := style_of(architecture, module.name)) not in (None, "colwise", "embedding_rowwise"):
            raise RefusedError(
                f"target_modules: {module.leaf} is {style}, and {named('peft')} makes its adapter as wide as a rank's part, "
                "which does not fit what transformers passes in: RuntimeError in the first forward; accepted: the modules that "
                f"are colwise, {', '.join(_colwise(architecture))}"
            )


def _check_unused(setup: Setup, adaptation: Adaptation) -> None:
    """Raise RefusedError for reentrant checkpoints of layers in which something trains: their graphs do not hang on the outputs,
    so DDP takes what trains in them for unused. Two ranks of gloo raise in the first micro batch that reduces, in full and with
    LoRA, of one layer too, and run where only a head, an embedding or the final norm trains, or with a static graph."""
    layers = [
        *(param.layers for param in adaptation.trained),
        *(tensor.layers for tensor in adaptation.added if tensor.trainable),
    ]
    if setup.use_reentrant and any(layers):
        raise RefusedError(
            "find_unused_parameters: with reentrant checkpoints DDP marks what trains in a layer ready twice: RuntimeError: "
            "Expected to mark a variable ready only once (torch, reducer.cpp); accepted: --no-find-unused-parameters (in "
            "TrainingArguments ddp_find_unused_parameters=False), --no-use-reentrant, or --static-graph without accumulation"
        )


OF_MODULES = (".weight", ".bias")
"""How the names of tensors of a module end. For others, in a ParameterDict, peft's wrap policy makes no unit of their own, and
for none that is frozen; accelerate takes that policy for models of peft alone."""


def _leaf(tensor: AddedTensor) -> str:
    """`vera_lambda_d`, `lora_A`: what a tensor of a layer is called."""
    return [part for part in tensor.name.removesuffix(".weight").split(".") if not part.isdigit()][-1]


def _check_flat(distributed: Distributed, setup: Setup, architecture: Architecture, adaptation: Adaptation) -> None:
    """Raise RefusedError for an adapter that FSDP1 cannot make flat with its layer, and for DoRA, which reads A outside its unit.
    Both were rehearsed, and run over two ranks of gloo. peft's wrap policy refuses classes that a model lacks."""
    if adaptation.added and setup.by.layout is ACCELERATE and (absent := absent_class(distributed, architecture)) is not None:
        raise RefusedError(
            f"strategy: {named('peft')} refuses it with FSDP1: TypeError: Could not find the transformer layer class to wrap in "
            f"the model ({absent.name}; utils/other.py, `fsdp_auto_wrap_policy`); accepted: {absent.accepted}, fsdp2 or zero3"
        )
    if any(".lora_magnitude_vector." in t.name for t in adaptation.added) and distributed.use_orig_params is not False:
        raise RefusedError(
            "strategy: FSDP1 has freed lora_A when DoRA reads it: IndexError: tuple index out of range "
            f"({named('peft')}, tuners/lora/dora.py:97); accepted: ddp, fsdp2 or zero3"
        )
    apart = [
        t
        for t in adaptation.added
        if t.dtype == "adapter" and not (t.trainable and t.name.endswith(OF_MODULES) and not is_bottleneck(t.name))
    ]
    if apart and setup.adapter_dtype != setup.dtype:
        raise RefusedError(
            f"strategy: FSDP1 makes one flat parameter of weights in {setup.dtype} and of {_leaf(apart[0])} in "
            f"{setup.adapter_dtype}: ValueError: Must flatten tensors with uniform dtype (torch, _flat_param.py:813); accepted: "
            "ddp or zero3"
        )


def _check_shards(distributed: Distributed, setup: Setup, adaptation: Adaptation) -> None:
    """Raise RefusedError for an adapter that reads shards as whole tensors under FSDP2, and for VeRA where its frozen matrices,
    which are buffers, stay in fp32: FSDP2 and DeepSpeed cast parameters alone, and do not run under autocast. ZeRO-3 leaves its
    vectors in fp32 too. Run over two ranks of gloo; VeRA, AdaLoRA and LN tuning rehearsed."""
    names = {_leaf(tensor) for tensor in adaptation.added}
    by_fsdp2 = distributed.strategy == "fsdp2"
    if by_fsdp2 and "lora_E" in names:
        raise RefusedError(
            "strategy: AdaLoRA's regularizer reads shards of A and B under FSDP2: RuntimeError: The size of tensor a must match "
            f"the size of tensor b ({named('peft')}, tuners/adalora/model.py:251); accepted: ddp or zero2"
        )
    if by_fsdp2 and "lora_magnitude_vector" in names and setup.by.casts_adapter(setup.quant) and setup.adapter_dtype == "bf16":
        raise RefusedError(
            f"strategy: {setup.by.called} casts A and B to bf16 and leaves DoRA's magnitudes in fp32, which FSDP2 refuses: "
            "AssertionError: FSDP expects uniform original parameter dtype (torch, _fsdp_param_group.py:283); accepted: ddp, or "
            "--trainer transformers"
        )
    if by_fsdp2 and any(".lora_A." in t.name and not t.trainable for t in adaptation.added):
        raise RefusedError(
            "strategy: LoRA-FA's optimizer fails in its first step under FSDP2: RuntimeError: aten.add.Tensor got mixed "
            f"torch.Tensor and DTensor ({named('peft')}, optimizers/lorafa.py:165); accepted: ddp"
        )
    divided_first = distributed.strategy == "zero3" and by_tensor(distributed, quantized=setup.quant not in (None, "none"))
    if divided_first and any(".ln_tuning_layers." in t.name for t in adaptation.added):
        raise RefusedError(
            f"strategy: {named('peft')} copies norms that ZeRO-3 has divided (tuners/ln_tuning/layer.py:47), and DeepSpeed finds "
            "several dtypes in what trains: AssertionError (runtime/zero/utils.py:218); accepted: ddp, fsdp2, zero2, or zero3 "
            "with zero3_init false"
        )
    wide = setup.autocast in SIXTEEN_BITS and setup.adapter_dtype not in SIXTEEN_BITS
    if "vera_lambda_d" in names and wide and distributed.strategy in ("fsdp2", "zero0", "zero1", "zero2"):
        raise RefusedError(
            f"strategy: VeRA multiplies an input in {setup.autocast} by its frozen matrices, which stay in {setup.adapter_dtype} "
            f"under {distributed.facts.called}: RuntimeError: expected mat1 and mat2 to have the same dtype ({named('peft')}, "
            "tuners/vera/layer.py:285); accepted: ddp or zero3"
        )


def _colwise(architecture: Architecture) -> list[str]:
    return sorted({module.leaf for module in architecture.modules if style_of(architecture, module.name) == "colwise"})
