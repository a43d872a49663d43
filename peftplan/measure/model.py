"""Build the model of a measured run on a real device as a user's script would: load, prepare, adapt, checkpoint.

`from_pretrained` itself loads the weights, from a state dict that creates each tensor on access. So order, casts, warm-up and
quantization are its own, a quantized base takes one tensor of host memory at a time, and nothing is downloaded. Values are
random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from peftplan.errors import PeftplanError, RefusedError
from peftplan.job import sources
from peftplan.job.job import Job
from peftplan.job.setup import Setup
from peftplan.libraries.count import COPIES, LORAFA_LR, _config_object, freeze_adapter, wrapped_task
from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers
from peftplan.libraries.quantized import TORCH_DTYPES
from peftplan.measure import losses
from peftplan.storage import QuantConfig
from peftplan.trace.checkpointing import checkpoint_layers
from peftplan.trace.peft_steps import LORAFA, lorafa_optimizer
from peftplan.trace.traced import as_peft_config

MEASURED = ("nf4", "fp4", "int8")
"""Formats that `from_pretrained` quantizes dense weights to."""

POOL_ELEMENTS = 2**20
"""How many random numbers are drawn. Weights repeat them, which is fast and makes no difference to memory."""
SCALE = 0.02
"""Standard deviation of the weights, that of transformers' `initializer_range`: activations stay finite."""


FIRST_TOKEN = 0
TOTAL_STEPS = 1000
"""AdaLoRA's `total_step` if it is unset. It decides when ranks are masked, and changes no byte."""
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class Built:
    """A model ready to train, and its base inside peft's wrapper. Counts are those of `get_nb_trainable_parameters`."""

    model: Any
    base: Any
    num_trainable: int
    num_total: int


class Weight:
    """A tensor of a checkpoint that is created when it is indexed, like a slice of a safetensors file."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, pool: torch.Tensor, number: int = 0) -> None:
        self.shape, self.dtype, self.pool, self.number = shape, dtype, pool, number

    def __getitem__(self, index: Any) -> torch.Tensor:
        numel = prod(self.shape)
        pool = self.pool.roll(self.number)  # of two tensors with the same values, the loader makes one
        tiled = pool.repeat(-(-numel // POOL_ELEMENTS))[:numel] if numel > POOL_ELEMENTS else pool[:numel].clone()
        whole = tiled.reshape(self.shape)
        return whole if index is Ellipsis else whole[index]


def make(job: Job, device: torch.device) -> Built:
    """The whole model on the device. Raises RefusedError for what cannot be built."""
    with quiet_transformers(), _without_bars():
        setup = job.setup
        base = load(job, device)
        there = setup.by.adapter_on_host(quantized=job.quant is not None)
        if there and job.quant is None:
            base.to(device)
        if job.quant is not None and setup.kbit_prepare:
            _kbit_prepare(base)
        checkpoint_layers(base, setup)
        losses.install(base, setup)
        peft_config = as_peft_config(job.method, job.config, job.adapter, job.adaptation)
        model = base if peft_config is None else adapt(base, peft_config, job)
    if not there:
        model.to(device)
    model.train()
    return Built(model, base, *counts(model))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bar of `from_pretrained`."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load(job: Job, device: torch.device) -> Any:
    """The base model: loaded on the host unless it is quantized or `device_map` says otherwise."""
    setup, config = job.setup, config_of(job)
    hf_config = build_config(config, name="model")
    if hf_config.is_encoder_decoder:
        _start_decoder(hf_config)
    cls = model_class(config, hf_config, name="model", task_type=job.architecture.task_type)
    state = weights(build_model(config, hf_config, cls, name="model"), TORCH_DTYPES[setup.dtype])
    device_map = setup.device_map if setup.device_map == "auto" else {"": device}
    placed = {"device_map": device_map} if setup.device_map != "none" or job.quant is not None else {}
    quantized = {} if job.quant is None else {"quantization_config": _bnb_config(job.quant)}
    return cls.from_pretrained(
        None,
        config=hf_config,
        state_dict=state,
        dtype=TORCH_DTYPES[setup.dtype],
        attn_implementation=setup.attn_implementation,
        **placed,
        **quantized,
    )


def _start_decoder(hf_config: Any) -> None:
    """Set the decoder's start token if the built-in config has none. The bytes are the same for each id."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(hf_config, name, None) is None:
            setattr(hf_config, name, FIRST_TOKEN)


def config_of(job: Job) -> dict[str, Any]:
    """The config.json of the job, with the job's number of labels."""
    labels = {} if job.setup.num_labels is None else {"num_labels": job.setup.num_labels}
    return {**sources.load_config(job.model), **labels}


def weights(model: Any, dtype: torch.dtype) -> dict[str, Weight]:
    """A checkpoint for a model on meta: every parameter once, and the buffers that are saved."""
    pool = torch.randn(POOL_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(SCALE).to(dtype)
    own = dict(model.named_parameters())
    saved = {name: tensor for name, tensor in model.state_dict().items() if name in dict(model.named_buffers())}
    tensors = {**own, **saved}.items()
    return {name: Weight(tensor.shape, dtype, pool, number) for number, (name, tensor) in enumerate(tensors)}


def _bnb_config(quant: QuantConfig) -> Any:
    """transformers' own config for a format of ours. Raises RefusedError for formats not in `MEASURED`."""
    from transformers import BitsAndBytesConfig

    if quant.name not in MEASURED:
        raise RefusedError(f"quant: {quant.name} cannot be measured; {', '.join(MEASURED)} can")
    skip = {"llm_int8_skip_modules": list(quant.skip_modules)} if quant.skip_modules else {}
    if quant.name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **skip)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.name,
        bnb_4bit_use_double_quant=bool(quant.double_quant),
        bnb_4bit_compute_dtype=TORCH_DTYPES[str(quant.compute_dtype)],
        **skip,
    )


def _kbit_prepare(model: Any) -> None:
    """`prepare_model_for_kbit_training`; its checkpointing is left to `make`."""
    import peft

    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]


def adapt(base: Any, peft_config: Mapping[str, Any], job: Job) -> Any:
    """`get_peft_model`, LoRA-FA's freezing, and the adapter's dtype: peft's fp32, TRL's bf16, or what the setup says."""
    import peft

    setup = job.setup
    cast_by_trl = setup.by.casts_adapter(setup.quant)
    before = {id(p) for p in base.parameters()}
    try:
        if peft_config.get("peft_type") == "ADALORA":
            peft_config = {"total_step": TOTAL_STEPS, **peft_config}
        method = _config_object(peft_config, wrapped_task(base, job.architecture.task_type))
        model: Any = peft.get_peft_model(base, method, autocast_adapter_dtype=cast_by_trl or setup.adapter_dtype == "fp32")
        if peft_config.get("freeze_a"):
            lorafa_optimizer(model, learning_rate=LORAFA_LR)  # freezes A
            model.__dict__[LORAFA] = True
        freeze_adapter(model, peft_config)
    except (PeftplanError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # peft raises whatever its code meets
        lines = " ".join(str(error).split())[:200]
        raise RefusedError(f"peft {peft.__version__} refuses it: {type(error).__name__}: {lines}") from error
    _cast(model, before, setup, by_trl=cast_by_trl)
    return model


def _cast(model: Any, before: set[int], setup: Setup, *, by_trl: bool) -> None:
    """Cast peft's own parameters to the adapter's dtype; copies of base modules keep theirs.

    TRL 1.16 casts everything that trains, except DoRA's magnitudes (`SFTTrainer.__init__`).
    """
    target = TORCH_DTYPES[str(setup.adapter_dtype)]
    for name, parameter in model.named_parameters():
        is_new = id(parameter) not in before and not any(part in name for part in COPIES)
        by_trainer = by_trl and parameter.requires_grad and MAGNITUDE not in name
        if (by_trainer if by_trl else is_new) and parameter.is_floating_point():
            parameter.data = parameter.data.to(target)


def counts(model: Any) -> tuple[int, int]:
    """(trainable, total) parameters as peft and transformers count them: 4-bit weights by their unpacked elements."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    return int(model.num_parameters(only_trainable=True)), int(model.num_parameters())
