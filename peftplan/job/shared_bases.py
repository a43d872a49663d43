"""Bases that the libraries refuse under a strategy, each with the line that raises, and how a rank loads a quantized one."""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.distributed.strategy import Distributed
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.errors import InputError, RefusedError
from peftplan.job.repositories import OVER_PACKED, PACKED
from peftplan.job.setup import Setup
from peftplan.methods.adaptation import Adaptation
from peftplan.storage import QuantConfig
from peftplan.storage.config import FOUR_BIT
from peftplan.versions import named

WITHOUT_AUTOCAST = ("fsdp2", "zero0", "zero1", "zero2", "zero3")
"""Strategies that cast the weights instead."""

FLOATS = ("fp16", "bf16", "fp32", "fp64")

LOADED_BY_PROGRAM = ("plain", "transformers", "trl", "sentence")
"""First words of the names of trainers that take a model which a program of yours has loaded."""

OF_ATTENTION = {"q_proj", "k_proj", "v_proj"}
"""What attention takes, in one dtype."""


def unprepared(setup: Setup, quant: QuantConfig | None, distributed: Distributed) -> Setup:
    """The setup of a 4-bit base that FSDP1 can make flat: norms stay in 16 bits beside packed weights that are stored so. Not
    where kbit preparation was asked for."""
    packed = quant is not None and quant.name in FOUR_BIT and quant.quant_storage == setup.dtype
    return setup.model_copy(update={"kbit_prepare": False}) if distributed.strategy == "fsdp1" and packed else setup


def _check_flat(distributed: Distributed, setup: Setup, architecture: Architecture, quant: QuantConfig) -> None:
    """Raise RefusedError where the norms of a layer have another dtype than its packed weights."""
    if distributed.strategy != "fsdp1" or quant.name not in FOUR_BIT:
        return
    norms = any(m.params and m.layers is not None and "Norm" in m.kind for m in architecture.modules)
    dtype = "fp32" if setup.kbit_prepare else setup.dtype
    if norms and dtype != quant.quant_storage:
        how = ", to which prepare_model_for_kbit_training casts them" if setup.kbit_prepare else ""
        raise RefusedError(
            f"quant_storage: FSDP1 makes one flat parameter of packed weights in {quant.quant_storage} and of norms in {dtype}"
            f"{how}: ValueError: Must flatten tensors with uniform dtype (torch, _flat_param.py:813); accepted: "
            f"--quant-storage {dtype}{' or --no-kbit-prepare' if setup.kbit_prepare else ''}"
        )


def check_base(
    distributed: Distributed, setup: Setup, architecture: Architecture, quant: QuantConfig | None, adaptation: Adaptation
) -> None:
    """Raise RefusedError for int8 under FSDP2 (rehearsed), for norms that FSDP1 cannot make flat with packed weights, and for
    (IA)³ without autocast."""
    if quant is not None:
        if distributed.strategy == "fsdp2" and quant.name == "int8" and setup.by.traced_on_ranks:  # axolotl patches torch
            raise RefusedError(
                f"quant: {named('bitsandbytes')} finds no scales in the plain parameters that FSDP2 makes of int8 weights: "
                "AttributeError: 'Parameter' object has no attribute 'CB' (nn/modules.py:1182); accepted: nf4, or ddp and zero2"
            )
        _check_flat(distributed, setup, architecture, quant)
        _check_gathered(distributed, setup, quant, adaptation)
        _check_scaled(distributed, setup, quant, adaptation)


def _check_gathered(distributed: Distributed, setup: Setup, quant: QuantConfig, adaptation: Adaptation) -> None:
    """Raise RefusedError for LoRA in fp32 beside packed weights in 16 bits without autocast: Trainer lets FSDP1 gather all in the
    dtype of packed weights, and peft casts its input to that of the shard. Rehearsed."""
    narrow = distributed.strategy == "fsdp1" and quant.name in FOUR_BIT and quant.quant_storage in SIXTEEN_BITS
    by_lora = any(".lora_A." in tensor.name for tensor in adaptation.added)
    by_trainer = setup.by.collects_batches  # a loop of one's own leaves each weight its dtype
    if narrow and by_trainer and by_lora and (setup.autocast, setup.adapter_dtype) == ("none", "fp32"):
        raise RefusedError(
            f"autocast: FSDP1 gathers adapters in {quant.quant_storage}, as packed weights are stored (transformers, "
            "distributed/fsdp.py, `update_fsdp_plugin_peft`), and peft casts their input to fp32: RuntimeError: expected mat1 "
            f"and mat2 to have the same dtype ({named('peft')}, tuners/lora/bnb.py:549); accepted: --autocast "
            f"{quant.quant_storage}, or --adapter-dtype {quant.quant_storage}"
        )


def _check_scaled(distributed: Distributed, setup: Setup, quant: QuantConfig, adaptation: Adaptation) -> None:
    """Raise RefusedError for (IA)³ that scales some of queries, keys and values over a bitsandbytes base without autocast: peft
    makes fp32 of 16 bits there. Three traces, of FSDP2, ZeRO-2 and ZeRO-3, fail so."""
    scaled = {tensor.name.split(".")[-2] for tensor in adaptation.added if tensor.name.endswith(".ia3_l")}
    narrow = distributed.strategy in WITHOUT_AUTOCAST and setup.autocast in SIXTEEN_BITS
    if quant.name in (*FOUR_BIT, "int8") and narrow and 0 < len(scaled & OF_ATTENTION) < len(OF_ATTENTION):
        raise RefusedError(
            f"strategy: (IA)³ makes {' and '.join(sorted(scaled & OF_ATTENTION))} in fp32 over a base in {quant.name}, and "
            f"attention takes {setup.autocast} beside it, since {distributed.facts.called} runs without autocast: RuntimeError: "
            f"Expected query, key, and value to have the same dtype ({named('peft')}, tuners/ia3/bnb.py:110); accepted: ddp"
        )


def _is_loaded_by_program(setup: Setup) -> bool:
    """Whether the trainer takes a model that a program of yours has loaded."""
    return setup.by.name.partition("-")[0] in LOADED_BY_PROGRAM


def check_flat_dtypes(distributed: Distributed, setup: Setup, architecture: Architecture) -> None:
    """Raise RefusedError where a unit of FSDP1 holds weights of two dtypes, such as a router that stays in fp32."""
    if distributed.strategy != "fsdp1" or setup.dtype == "fp32" or not _is_loaded_by_program(setup):
        return
    names = [f"{module.name}.{name}" for module in architecture.modules for name, _ in module.params]
    wide = next((name for name in names for kept in architecture.keep_in_fp32_strict if name.endswith(kept)), None)
    if wide is not None:
        raise RefusedError(
            f"strategy: {wide} stays in fp32 beside {setup.dtype}, which FSDP1 refuses: ValueError: Must flatten tensors with "
            "uniform dtype (torch, _flat_param.py); accepted: fsdp2, or --dtype fp32"
        )


def packs_integers(quant: QuantConfig | None) -> bool:
    """Whether packed 4-bit weights are stored as integers, which FSDP2 does not shard."""
    return quant is not None and quant.name in FOUR_BIT and quant.quant_storage not in FLOATS


def loaded_by_rank(setup: Setup, distributed: Distributed, quant: QuantConfig | None, *, chosen: object) -> Setup:
    """The setup of a rank, which loads no model on a device map (trl, `SFTTrainer.__init__`: it "fails" in distributed training),
    but a quantized one on the host, of which FSDP2 moves a unit at a time (accelerate, `fsdp2_prepare_model`), and packed weights
    on its own GPU.

    Raises InputError where another map is `chosen`, and RefusedError where ranks cannot move what is on the host.
    """
    if chosen == "cpu" and quant is not None:
        if distributed.strategy == "fsdp1":
            raise RefusedError(
                f"device_map: {named('accelerate')} refuses a quantized model on the host under FSDP1: ValueError: You can't "
                "train a model that has been loaded in 8-bit or 4-bit precision on a different device than the one you're "
                "training on (accelerator.py:1867); accepted: --strategy fsdp2"
            )
        if distributed.strategy == "fsdp2" and quant.name in FOUR_BIT:
            if not _is_loaded_by_program(setup):
                raise RefusedError(
                    f"device_map: {setup.by.called} loads the model itself, not on the host; accepted: none, or cpu with a "
                    "trainer of transformers or TRL"
                )
            if packs_integers(quant):
                raise RefusedError(
                    "device_map: FSDP2 leaves packed weights that are stored as whole numbers on the host; add --quant-storage "
                    "bf16"
                )
            return setup
    if chosen == "cuda" and distributed.strategy in OVER_PACKED and quant is not None and quant.name in PACKED:
        return setup
    if chosen not in (None, "none"):
        raise InputError(
            "device_map",
            chosen,
            "accepted: none under a strategy, cpu for 4-bit weights under fsdp2, or cuda for gptq and awq "
            f"under {', '.join(OVER_PACKED)}; --strategy device-map puts layers on several GPUs",
        )
    return setup.model_copy(update={"device_map": "none"})
