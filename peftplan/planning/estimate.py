"""`estimate`: from a model, a method and a setup to an `Estimate`. Composition only; the arithmetic lives down the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from peftplan import parameters
from peftplan.arch.modules import Architecture
from peftplan.errors import NeedsTraceError, RefusedError, UnknownNameError
from peftplan.memory.ledger import Ledger
from peftplan.methods.adaptation import Adaptation, MethodConfig, adapter_on_host
from peftplan.optim import Optimizer, parse_optim, parse_optim_args
from peftplan.planning.job import Job
from peftplan.planning.prepare import config_of, prepare
from peftplan.planning.result import Estimate, Peaks
from peftplan.planning.script import NO_SCRIPT, Script
from peftplan.planning.setup import CAST_BY_TRL, Engine, Setup, check_length, parse_setup
from peftplan.planning.tasks import without_loss
from peftplan.planning.verdicts import capability, find_cards, verdict
from peftplan.storage import QuantConfig

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu

NOT_COUNTED = ("activations", "logits", "temporaries of forward, backward and step", "cuBLAS workspaces", "CUDA context")
"""What is missing from an estimate that states no peak."""

OUTSIDE = ("CUDA context",)
"""What lies outside torch's allocator, and so outside every peak."""


def estimate(
    model: Any,
    *,
    method: str | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    training_args: Any = None,
    gpu: str | Iterable[str] | None = None,
    engine: Engine = "analytic",
    script: Script = NO_SCRIPT,
    record: bool = False,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Estimate:
    """What fine-tuning `model` needs.

    `model`: a built-in name, a Hub id, a path to a config.json or its folder, a config dict, or a transformers
    `PretrainedConfig`. `method`: a name of `peftplan.methods.METHODS` (default `lora`), or give `peft_config`: an
    adapter_config dict or any peft `PeftConfig`. `quantization_config`: a transformers `BitsAndBytesConfig`.
    `training_args`: a transformers `TrainingArguments` or TRL `SFTConfig`. `options`: fields of `planning.setup.Setup`, and
    the method's own fields under peft's names (`r`, `target_modules`, …). `gpu`: names of cards, or capacities such as 24GiB.
    An explicit option wins over the objects. `script`: what a hand-written program does besides. Of the trace engine: `record`
    keeps the whole run as `peaks.recording`, and `progress` is called with what is done now and the share that is behind.

    Raises InputError, UnknownNameError, RefusedError or MissingExtraError, each with a message of one line.
    """
    if engine not in ("analytic", "trace"):
        raise UnknownNameError("engine", engine, ("analytic", "trace"))
    job = prepare(
        model,
        method=method,
        peft_config=peft_config,
        quantization_config=quantization_config,
        training_args=training_args,
        script=script,
        **options,
    )
    built, static = _static(job.architecture, job.adaptation, job.quant, job.setup)
    cards = find_cards(gpu)
    if engine == "trace":
        if (why := without_loss(model, job.architecture)) is not None:
            raise RefusedError(why)
        return _estimated(job, built, static, cards, _traced(job, cards, record=record, progress=progress), engine=engine)

    def again(**changes: Any) -> Estimate:
        given = {
            "method": method, "peft_config": peft_config, "quantization_config": quantization_config,
            "training_args": training_args, "script": script, **options,
        }  # fmt: skip
        other = prepare(model, **{**given, **changes})
        return _analytic(other, *_static(other.architecture, other.adaptation, other.quant, other.setup), cards, hasty=True)

    def advise(card: str) -> Any:
        from peftplan.planning.advice import advice

        return advice(job, again, gpu=card)

    return replace(_analytic(job, built, static, cards), advise=advise)


def _estimated(
    job: Job,
    built: parameters.Parameters,
    static: Ledger,
    cards: list[Gpu],
    found: Peaks | str,
    *,
    engine: Engine,
    hasty: bool = False,
) -> Estimate:
    """The result; `found` are the peaks, or what part of the job has none."""
    peaks = None if isinstance(found, str) else found
    assumptions = _assumptions(job.setup, job.quant, job.architecture, job.adaptation, quantized=built.quantized)
    if peaks is not None:
        assumptions |= {"compute_capability": capability(cards), **peaks.assumed}
    return Estimate(
        engine=engine,
        model=model_facts(job.architecture),
        method={
            "name": job.method.name if job.method else str(job.adapter.get("peft_type")).lower(),
            "config": config_facts(job.config, job.adapter),
        },
        parameters=built,
        adaptation=job.adaptation,
        static=static,
        assumptions=assumptions,
        not_modelled=OUTSIDE if peaks is not None else (f"{found}", *NOT_COUNTED),
        gpus=tuple(verdict(card, static.bytes(), peaks, hasty=hasty) for card in cards),
        peaks=peaks,
        resize=None if engine == "trace" or peaks is None else partial(_at, job, built, static, cards),
    )


def _analytic(job: Job, built: parameters.Parameters, static: Ledger, cards: list[Gpu], *, hasty: bool = False) -> Estimate:
    """The estimate by formula, without peaks where a part of the job has none.

    `hasty`: no replay for a job whose tensors alone do not fit a card.
    """
    from peftplan.planning.analytic import analytic_peaks

    found: Peaks | str
    if (why := without_loss(job.model, job.architecture)) is not None:
        return _estimated(job, built, static, cards, why, engine="analytic")
    try:
        found = analytic_peaks(job, built, static, compute_capability=capability(cards))
    except NeedsTraceError as missing:
        found = f"{missing}{missing.hint}"
    return _estimated(job, built, static, cards, found, engine="analytic", hasty=hasty)


def _at(job: Job, built: parameters.Parameters, static: Ledger, cards: list[Gpu], batch_size: Any, seq_len: Any) -> Any:
    """The job at other sizes: an Estimate for whole numbers, a Grid for arrays."""
    b = job.setup.batch_size if batch_size is None else batch_size
    s = job.setup.seq_len if seq_len is None else seq_len

    def at(b: Any, s: Any) -> Job:
        setup = parse_setup({**job.setup.model_dump(), "batch_size": b, "seq_len": s})
        check_length(setup.seq_len, job.architecture.max_positions)
        return job._replace(setup=setup)

    if not hasattr(b, "shape") and not hasattr(s, "shape"):
        return _analytic(at(b, s), built, static, cards)
    from peftplan.planning.analytic import Compiled, compiled
    from peftplan.planning.grid import evaluate

    def compile_at(b: int, s: int) -> Compiled:
        return compiled(at(b, s), built, static, compute_capability=capability(cards))

    return evaluate(compile_at, batch_size=b, seq_len=s, max_positions=job.architecture.max_positions)


def _static(
    architecture: Architecture, adaptation: Adaptation, quant: QuantConfig | None, setup: Setup
) -> tuple[parameters.Parameters, Ledger]:
    """The parameters, and the lines of what lasts from step to step with the gradients."""
    optimizer = parse_optim(str(setup.optim))
    adapter_dtype, trained_dtype = adapter_dtypes(setup)
    built = parameters.build(
        architecture,
        adaptation,
        dtype=setup.dtype,
        adapter_dtype=adapter_dtype,
        quant=quant,
        kbit_prepare=bool(setup.kbit_prepare),
        trained_dtype=trained_dtype,
    )
    static = (
        parameters.weight_lines(built)
        + parameters.buffer_lines(
            architecture,
            adaptation,
            dtype=setup.dtype,
            adapter_dtype=adapter_dtype,
            on_host=adapter_on_host(setup.trainer, quantized=quant is not None),
        )
        + parameters.gradient_lines(built, optimizer)
        + _optimizer(built, optimizer, setup)
        + parameters.sensitivity_lines(built)
    )
    return built, static


def _traced(job: Job, cards: list[Gpu], **how: Any) -> Peaks:
    """The peaks of the trace engine, with the kernels of the first card."""
    from peftplan.planning.traced import trace_peaks, traced_config

    return trace_peaks(
        config_of(job.model, job.setup),
        architecture=job.architecture,
        peft_config=traced_config(job.method, job.config, job.adapter, job.adaptation),
        quant=job.quant,
        setup=job.setup,
        script=job.script,
        compute_capability=capability(cards),
        **how,
    )


def adapter_dtypes(setup: Setup) -> tuple[str, str | None]:
    """What peft leaves the adapter in, and what the trainer then casts all that trains to: TRL bf16, on a quantized base."""
    if setup.trainer == "trl" and setup.quant in CAST_BY_TRL and setup.adapter_dtype == "bf16":
        return "fp32", "bf16"
    return str(setup.adapter_dtype), None


def _optimizer(built: parameters.Parameters, optimizer: Optimizer, setup: Setup) -> Ledger:
    return parameters.optimizer_lines(
        built,
        optimizer,
        parse_optim_args(setup.optim_args),
        by_trainer=setup.trainer != "plain",
        target_modules=setup.optim_target_modules,
    )


def model_facts(architecture: Architecture) -> dict[str, Any]:
    """What a result says of its model."""
    return {
        "name": architecture.name,
        "model_type": architecture.model_type,
        "model_class": architecture.model_class,
        "num_parameters": architecture.num_parameters,
        "source": architecture.source,
    }


def config_facts(config: MethodConfig | None, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of its method's options."""
    return config.model_dump(mode="json", exclude_none=True) if config is not None else dict(adapter)


def _assumptions(
    setup: Setup, quant: QuantConfig | None, architecture: Architecture, adaptation: Adaptation, *, quantized: int
) -> dict[str, Any]:
    """Every value that the numbers rest on, defaults included."""
    assumed: dict[str, Any] = {"model": architecture.source, "model_class": architecture.model_class}
    assumed |= {key: value for key, value in setup.model_dump(mode="json").items() if value is not None}
    assumed["quant"] = quant.name if quant else "none"
    assumed |= {} if quant is None else {"double_quant": quant.double_quant, "compute_dtype": quant.compute_dtype}
    assumed |= {key: list(value) if isinstance(value, tuple) else value for key, value in adaptation.resolved if value}
    if adaptation.matched:
        assumed["matched_modules"] = sum(module.copies for module in adaptation.matched)
    notes = [*architecture.notes, *adaptation.notes]
    if quant is not None:
        assumed["quantized_parameters"] = quantized
        notes += _left_in_16_bits(architecture, quant, quantized)
    return assumed | ({"notes": notes} if notes else {})


def _left_in_16_bits(architecture: Architecture, quant: QuantConfig, quantized: int) -> list[str]:
    """What surprises most: formats that replace linear layers leave the fused experts of mixture models as they are."""
    experts = sum(m.copies * prod(shape) for m in architecture.modules if m.kind.startswith("Experts") for _, shape in m.params)
    if not experts or quantized >= experts:
        return []
    share = experts / architecture.num_parameters
    return [f"{quant.name} leaves the fused experts ({experts:,} parameters, {share:.0%} of the model) unquantized"]
