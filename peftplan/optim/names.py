"""Every name of transformers' `OptimizerNames` (5.24, `training_args.py`): 37 with states, 4 refused with the reason.

transformers looks names up by value, so there are no aliases besides its own (`adamw_8bit` is `adamw_bnb_8bit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peftplan.errors import RefusedError, UnknownNameError
from peftplan.optim.adafactor import adafactor, adalomo, lomo
from peftplan.optim.bnb import ademamix, bnb, code_tables, one_state, two_state
from peftplan.optim.community import (
    COPY,
    adam_mini,
    axolotl_muon,
    badam,
    dion_muon,
    flash_adamw,
    grokadamw,
    moment,
    moonlight_muon,
    schedule_free_adamw,
    schedule_free_sgd,
    stable_adamw,
    te_fused_adam,
)
from peftplan.optim.low_rank import apollo_adamw, galore_adafactor, galore_adamw, galore_adamw_8bit, galore_adamw_8bit_layerwise
from peftplan.optim.optimizer import (
    CopiesFunction,
    Optimizer,
    SharedFunction,
    StatesFunction,
    StepFunction,
    nothing_shared,
    truth,
)
from peftplan.optim.optimizer import (
    StepImplementation as Step,
)
from peftplan.optim.torch_optim import adagrad, adamw, adamw_fused, deepspeed_adam, deepspeed_lion, rmsprop, sgd
from peftplan.optim.torchao import copies_in_4_bits, copies_in_8_bits, step_in_4_bits, step_in_8_bits, torchao
from peftplan.versions import named

Reads = Mapping[str, Callable[[str], object]]

SGD: Reads = {"momentum": float, "dampening": float, "weight_decay": float, "nesterov": str}
ADAGRAD: Reads = {"lr_decay": float, "weight_decay": float, "eps": float}
RMSPROP: Reads = {"momentum": float, "alpha": float, "eps": float, "weight_decay": float, "centered": str}
ADEMAMIX: Reads = {**dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps"), float), "t_alpha": int, "t_beta3": int}
TORCHAO: Reads = {"block_size": str, "bf16_stochastic_round": truth}
GALORE: Reads = {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str}
APOLLO: Reads = {**GALORE, "proj": str, "scale_type": str}
GROK: Reads = dict.fromkeys(("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), float)
FREE: Reads = {"weight_lr_power": float, "r": float}
FLASH: Reads = {"master_weight_bits": int}
MASTERS: Reads = {
    **dict.fromkeys(("master_weights", "store_param_remainders"), truth),
    **dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), moment),
}
MINI: Reads = {"dim": int, "n_heads": int}
STABLE: Reads = {"max_lr": float, "kahan_sum": str, "decouple_lr": str}


def _torch(name: str, cls: str, states: StatesFunction, reads: Reads, *, made_with_states: bool = False) -> Optimizer:
    return Optimizer(name, "torch", f"torch.optim.{cls}", "foreach", states, reads, made_with_states=made_with_states)


def _bnb(name: str, cls: str, states: StatesFunction, reads: Reads) -> Optimizer:
    return Optimizer(name, "bitsandbytes", f"bitsandbytes.optim.{cls}", "kernel", states, reads, code_tables)


def _ao(name: str, cls: str, states: StatesFunction, temporaries: StepFunction, copies: CopiesFunction) -> Optimizer:
    return Optimizer(name, "torchao", f"torchao.optim.{cls}", "kernel", states, TORCHAO, temporaries=temporaries, copies=copies)


def _free(name: str, cls: str, states: StatesFunction) -> Optimizer:
    return Optimizer(name, "schedulefree", f"schedulefree.{cls}", "foreach", states, FREE)


def _galore(name: str, cls: str, states: StatesFunction, step: Step, shared: SharedFunction) -> Optimizer:
    return Optimizer(name, "galore-torch", f"galore_torch.{cls}", step, states, GALORE, shared, low_rank=True)


def _apollo(name: str, step: Step) -> Optimizer:
    return Optimizer(name, "apollo-torch", "apollo_torch.APOLLOAdamW", step, apollo_adamw, APOLLO, low_rank=True)


_ROWS = (
    _torch("adamw_torch", "AdamW", adamw, {}),
    Optimizer("adamw_torch_fused", "torch", "torch.optim.AdamW", "fused", adamw_fused),
    _torch("sgd", "SGD", sgd, SGD),
    _torch("adagrad", "Adagrad", adagrad, ADAGRAD, made_with_states=True),
    _torch("rmsprop", "RMSprop", rmsprop, RMSPROP),
    Optimizer("adafactor", "transformers", "transformers.optimization.Adafactor", "for-loop", adafactor),
    _bnb("adamw_bnb_8bit", "AdamW", bnb(two_state, bits=8), {}),
    _bnb("adamw_8bit", "AdamW", bnb(two_state, bits=8), {}),
    _bnb("paged_adamw_32bit", "AdamW", bnb(two_state, bits=32, paged=True), {}),
    _bnb("paged_adamw_8bit", "AdamW", bnb(two_state, bits=8, paged=True), {}),
    _bnb("ademamix", "AdEMAMix", bnb(ademamix, bits=32), ADEMAMIX),
    _bnb("ademamix_8bit", "AdEMAMix", bnb(ademamix, bits=8), ADEMAMIX),
    _bnb("paged_ademamix_32bit", "AdEMAMix", bnb(ademamix, bits=32, paged=True), ADEMAMIX),
    _bnb("paged_ademamix_8bit", "AdEMAMix", bnb(ademamix, bits=8, paged=True), ADEMAMIX),
    _bnb("lion_32bit", "Lion", bnb(one_state, bits=32), {}),
    _bnb("lion_8bit", "Lion", bnb(one_state, bits=8), {}),
    _bnb("paged_lion_32bit", "Lion", bnb(one_state, bits=32, paged=True), {}),
    _bnb("paged_lion_8bit", "Lion", bnb(one_state, bits=8, paged=True), {}),
    # no optim_args: transformers hands them over as text, and bitsandbytes fails when it compares them with numbers
    _bnb("rmsprop_bnb", "RMSprop", bnb(one_state, bits=32), {}),
    _bnb("rmsprop_bnb_32bit", "RMSprop", bnb(one_state, bits=32), {}),
    _bnb("rmsprop_bnb_8bit", "RMSprop", bnb(one_state, bits=8), {}),
    _ao("adamw_torch_4bit", "AdamW4bit", torchao(bits=4), step_in_4_bits, copies_in_4_bits),
    _ao("adamw_torch_8bit", "AdamW8bit", torchao(bits=8), step_in_8_bits, copies_in_8_bits),
    _galore("galore_adamw", "GaLoreAdamW", galore_adamw, "for-loop", nothing_shared),
    _galore("galore_adamw_layerwise", "GaLoreAdamW", galore_adamw, "in-backward", nothing_shared),
    _galore("galore_adamw_8bit", "GaLoreAdamW8bit", galore_adamw_8bit, "for-loop", code_tables),
    _galore("galore_adamw_8bit_layerwise", "GaLoreAdamW8bit", galore_adamw_8bit_layerwise, "in-backward", nothing_shared),
    _galore("galore_adafactor", "GaLoreAdafactor", galore_adafactor, "for-loop", nothing_shared),
    _apollo("apollo_adamw", "for-loop"),
    _apollo("apollo_adamw_layerwise", "in-backward"),
    Optimizer("lomo", "lomo-optim", "lomo_optim.Lomo", "in-backward", lomo),
    Optimizer(
        "adalomo", "lomo-optim", "lomo_optim.AdaLomo", "in-backward", adalomo, states_for_frozen=True, made_with_states=True
    ),
    Optimizer("grokadamw", "grokadamw", "grokadamw.GrokAdamW", "for-loop", grokadamw, GROK),
    Optimizer("stable_adamw", "torch-optimi", "optimi.StableAdamW", "kernel", stable_adamw, STABLE),
    _free("schedule_free_adamw", "AdamWScheduleFree", schedule_free_adamw),
    _free("schedule_free_radam", "RAdamScheduleFree", schedule_free_adamw),
    _free("schedule_free_sgd", "SGDScheduleFree", schedule_free_sgd),
)
OPTIMIZERS: dict[str, Optimizer] = {row.name: row for row in _ROWS}
"""The optimizers whose states are known, by the name that `TrainingArguments.optim` accepts."""

OF_AUTOMODEL: dict[str, Optimizer] = {
    "adam": _torch("adam", "Adam", adamw, {}),
    "adam_one_by_one": Optimizer("adam_one_by_one", "torch", "torch.optim.Adam", "for-loop", adamw),
    "dion_muon": Optimizer("dion_muon", "dion", "dion.Muon", "for-loop", dion_muon, made_with_states=True),
    "te_fused_adam": Optimizer(
        "te_fused_adam", "transformer-engine", "transformer_engine.pytorch.optimizers.FusedAdam", "kernel", te_fused_adam, MASTERS
    ),
    "flash_adamw": Optimizer("flash_adamw", "flashoptim", "flashoptim.FlashAdamW", "kernel", flash_adamw, FLASH),
}
"""Those that NeMo Automodel makes by their class: Adam with a weight decay, which is added to copies of the gradients, or over
one parameter at a time (`foreach=False`); Muon."""
OF_LLAMA_FACTORY: dict[str, Optimizer] = {
    "badam": Optimizer("badam", "badam", "badam.BlockOptimizer", "fused", badam, made_with_states=COPY),
    "adam_mini": Optimizer("adam_mini", "adam-mini", "adam_mini.Adam_mini", "for-loop", adam_mini, MINI),
    "moonlight_muon": Optimizer(
        "moonlight_muon", "llamafactory", "llamafactory.third_party.muon.Muon", "for-loop", moonlight_muon
    ),
}
"""Those that LLaMA-Factory hands to Trainer."""
OF_AXOLOTL: dict[str, Optimizer] = {
    "axolotl_muon": Optimizer("axolotl_muon", "axolotl", "axolotl.contribs.mit.muon.DistMuon", "for-loop", axolotl_muon),
}
"""Those that axolotl makes for shards of FSDP2."""
OF_DEEPSPEED: dict[str, Optimizer] = {
    "deepspeed_adam": Optimizer("deepspeed_adam", "deepspeed", "deepspeed.ops.adam.FusedAdam", "kernel", deepspeed_adam),
    "deepspeed_cpu_adam": Optimizer(
        "deepspeed_cpu_adam", "deepspeed", "deepspeed.ops.adam.DeepSpeedCPUAdam", "kernel", deepspeed_adam
    ),
    "deepspeed_cpu_lion": Optimizer(
        "deepspeed_cpu_lion", "deepspeed", "deepspeed.ops.lion.DeepSpeedCPULion", "kernel", deepspeed_lion
    ),
}
"""Those that DeepSpeed makes by its config, and accelerate for a step on the host."""
BESIDE = OF_AUTOMODEL | OF_LLAMA_FACTORY | OF_AXOLOTL | OF_DEEPSPEED
"""Optimizers that a tool makes by their class."""

REFUSED: dict[str, str] = {
    "adamw_torch_xla": "it needs torch_xla and runs on XLA devices, not on CUDA",
    "adamw_torch_npu_fused": "it needs torch_npu and runs on Ascend NPUs, not on CUDA",
    "adamw_anyprecision": "torchdistx is unmaintained and has no release for torch 2, so its states cannot be checked",
    "galore_adafactor_layerwise": f"{named('transformers')} makes it with relative_step=True and a learning rate, and"
    " galore-torch raises ValueError; use galore_adafactor",
}
"""Names that transformers lists but that do not run on CUDA, or whose states cannot be stated exactly."""


def parse_optim(name: str) -> Optimizer:
    """The optimizer of this name; RefusedError with the reason, or UnknownNameError with the nearest names."""
    if name in REFUSED:
        raise RefusedError(f"optim: {name} is refused: {REFUSED[name]}")
    if (optimizer := OPTIMIZERS.get(name) or BESIDE.get(name)) is None:
        raise UnknownNameError("optim", name, OPTIMIZERS)
    return optimizer
