"""Options separated into those of the launcher, the setup, the method and the stored checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import peftplan.methods as methods
from peftplan import versions
from peftplan.distributed.names import OPTIONS
from peftplan.dtypes import AS_LOADED, OF_CHECKPOINT
from peftplan.errors import InputError, RefusedError
from peftplan.job import sources as architectures
from peftplan.job.launch import FILES, OF_FSDP, launch_options
from peftplan.job.repositories import PACKED
from peftplan.job.script import Script
from peftplan.job.setup import Setup
from peftplan.job.trainers import DEFAULT, TRAINERS
from peftplan.methods.saved import SAVED_HEADS
from peftplan.storage import QuantConfig, check_trainable, parse_quant

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed

Options = Mapping[str, object]
NOT_ON_4_BIT = ("loha", "lokr")
"""Methods whose forward adds an update to the packed weight itself (`LycorisLayer`, peft) and raises a RuntimeError."""


def dtype_of_weights(
    model: object, model_config: Options, set_here: Options, script: Script, *, all_train: bool = False
) -> dict[str, str]:
    """The dtype in which `from_pretrained` loads a model for which none is named. Where its checkpoint's is not known, bf16; fp32
    where all weights train under fp16 autocast, whose gradients torch unscales in no 16 bits."""
    dtype = set_here.get("dtype")
    if dtype == AS_LOADED and versions.DTYPE_OF_CHECKPOINT.after(script.transformers):
        return {"dtype": "fp32"}
    if dtype not in (OF_CHECKPOINT, AS_LOADED):
        return {}
    assumed = "fp32" if all_train and set_here.get("autocast") == "fp16" else "bf16"
    return {"dtype": architectures.checkpoint_dtype(model, model_config) or assumed}


def launched_options(options: Options, script: Script) -> tuple[dict[str, object], dict[str, object], tuple[str, ...]]:
    """(options of the strategy, all others), both with what launch files say, and notes on what these ask in vain."""
    from_files, _ = launch_options(options)
    options = {name: value for name, value in options.items() if name not in FILES}
    options |= {name: value for name, value in from_files.items() if options.get(name) is None}
    launched = {k: v for k, v in options.items() if k in OPTIONS}
    notes: tuple[str, ...] = ()
    if any(name in options for name in OF_FSDP):
        from peftplan.job.launch.accelerate import of_release

        stated = {name: options.pop(name) for name in OF_FSDP if name in options}
        launched, notes = of_release(launched, stated, script.transformers)
    return launched, {k: v for k, v in options.items() if k not in OPTIONS}, notes


def parse_distributed(launched: Options) -> Distributed | None:
    """The strategy of these options; None for one GPU, most jobs, which do not pay for its schema."""
    if all(value is None for value in launched.values()):
        return None
    from peftplan.distributed.strategy import parse_distributed

    return parse_distributed(launched)


def separate_options(options: Options) -> tuple[dict[str, object], dict[str, object]]:
    """(options of the setup, fields of the method)."""
    known = Setup.model_fields
    return {k: v for k, v in options.items() if k in known}, {k: v for k, v in options.items() if k not in known}


def stored_format(model_config: Options, set_here: Options) -> dict[str, object]:
    """The format of the checkpoint, if its config states one. transformers loads it in no other, so none may be asked for."""
    stored = model_config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return {}
    method = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
    if method in PACKED:
        _refuse_other_layouts(stored, COUNTED[method])
        own = {"quant_bits": stored.get("bits", 4)} if method == "gptq" else {}
        if method == "awq" and stored.get("modules_to_not_convert"):
            own = {"quant_skip_modules": stored["modules_to_not_convert"]}
        as_stored = {"quant": method, "quant_group_size": stored.get("group_size", 128), **own}
    elif stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        from peftplan.job import ecosystem

        as_stored = {name: value for name, value in ecosystem.quant_options(stored).items() if value is not None}
    else:
        return {}
    if set_here.get("quant", as_stored["quant"]) != as_stored["quant"]:
        raise RefusedError(
            f"quant: {set_here['quant']} is not how this repository stores its weights ({as_stored['quant']}), and transformers "
            "loads them as they are stored; leave it out, or name the repository that stores 16 bits"
        )
    return as_stored


COUNTED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "gptq": {
        "checkpoint_format": (None, "gptq", "gptq_v2"),
        "format": (None, "gptq", "gptq_v2"),
        "dynamic": (None, {}),
        "modules_in_block_to_quantize": (None, []),
        "lm_head": (None, False),
    },
    "awq": {"version": (None, "gemm", "GEMM"), "format": (None, "gemm", "GEMM")},
}
"""Fields of a stored format that say which layers are packed, or how, and the values with which they are counted."""


def _refuse_other_layouts(stored: Options, counted: Mapping[str, tuple[object, ...]]) -> None:
    """Raise InputError for a field that packs layers otherwise than is counted."""
    for field, accepted in counted.items():
        value = getattr(stored.get(field), "value", stored.get(field))
        if value not in accepted:
            names = ", ".join(str(each) for each in accepted if isinstance(each, str)) or "none"
            raise InputError(f"quantization_config.{field}", value, f"layers packed so are not counted; accepted: {names}")


def task_of_adapter(adapter: Options) -> dict[str, str]:
    """The task of an adapter with a head, which the model's config seldom names: the user loads the class for the adapter.

    Other tasks come from the config, since people also write CAUSAL_LM for vision-language models.
    """
    task = adapter.get("task_type")
    task = getattr(task, "value", task)
    return {"task_type": str(task)} if task in SAVED_HEADS else {}


def setup_of_method(method: methods.Method | None, setup_options: Options) -> dict[str, object]:
    """What a method implies for options that are not set.

    QLoRA is NF4 with double quantization and bf16 compute. Prefix tuning runs without checkpointing, since peft refuses both.
    """
    if method is not None and method.peft_type == "PREFIX_TUNING":
        return {"gradient_checkpointing": False}
    if method is None or method.quant is None:
        return {}
    quant = setup_options.get("quant") or method.quant
    if quant == "none":
        raise InputError(
            "quant", "none", f"{method.name} trains adapters on a quantized base; accepted: a format, or another method"
        )
    four_bit = {"double_quant": True, "compute_dtype": "bf16"} if quant in ("nf4", "fp4") else {}
    return {"quant": quant, **four_bit}


def setup_of_trainer(method: methods.Method | None, setup_options: Options) -> dict[str, object]:
    """The task and the scores of a trainer's head, where it has one of its own, and the dtype that it trains a whole model in."""
    name = setup_options.get("trainer", DEFAULT)
    if not isinstance(name, str) or name not in TRAINERS:
        return {}
    trainer = TRAINERS[name]
    if trainer.num_labels is not None:
        return {"task_type": trainer.task, "num_labels": trainer.num_labels}
    if trainer.embeds or trainer.passages == "apart":
        return {"task_type": trainer.task}
    whole = method is not None and method.name == "full"
    return {"dtype": "fp32"} if whole and trainer.full_in_fp32 else {}


def quant_of(setup: Setup, method: methods.Method | None) -> QuantConfig | None:
    quant = parse_quant(
        setup.quant or "none",
        double_quant=setup.double_quant,
        bits=setup.quant_bits,
        group_size=setup.quant_group_size,
        blocksize=setup.quant_blocksize,
        compute_dtype=setup.compute_dtype or (setup.dtype if setup.quant in ("nf4", "fp4") else None),
        quant_storage=setup.quant_storage,
        skip_modules=setup.quant_skip_modules,
        experts=bool(setup.quant_experts),
    )
    if quant is not None and quant.name == "nf4" and setup.by.own_modules:
        quant = quant._replace(by_torchao=True, double_quant=True)
    check_trainable(quant)
    if quant is not None and method is not None and method.name == "full":
        raise RefusedError(f"quant: a base stored as {quant.name} cannot be trained in full; use a PEFT method or --quant none")
    if quant is not None and method is not None and method.name == "partial" and setup.by.drops_outputs:
        raise RefusedError(f"quant: Trainer refuses a base stored as {quant.name} without an adapter; accepted: none")
    if quant is not None and method is not None and method.name in NOT_ON_4_BIT and quant.name in ("nf4", "fp4"):
        raise RefusedError(f"quant: peft's {method.name} fails on the packed weights of a 4-bit base; accepted: int8 or none")
    return quant
