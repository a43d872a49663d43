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
from peftplan.job.job import Job
from peftplan.job.prepare import check_rank_allocator, config_of, prepare
from peftplan.job.requirements import pair, unmet
from peftplan.job.script import EXAMPLES, NO_SCRIPT, Script
from peftplan.job.setup import SEARCHES, AdviceSearch, Engine, Setup, check_length, check_logits_to_keep, parse_setup
from peftplan.job.tasks import OF_TOKENS, PICTURES, head_notes, task_notes, without_loss
from peftplan.job.words import named_as_typed
from peftplan.ledger import Ledger
from peftplan.methods.adaptation import Adaptation, MethodConfig
from peftplan.optim import Optimizer, parse_optim, parse_optim_args
from peftplan.planning.verdicts import capability, card_notes, find_cards, verdict
from peftplan.results.estimate import Estimate, Peaks, Verdict
from peftplan.storage import QuantConfig
from peftplan.storage.modules import CONVERTED_KINDS

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu
    from peftplan.results.advice import Advised

NOT_COUNTED = ("activations", "logits", "temporaries of forward, backward and step", "cuBLAS workspaces", "CUDA context")
"""What an estimate without a peak leaves out."""

SAID_ELSEWHERE = {"r", "target_modules", "target_parameters", "lora_alpha"}
"""Fields of a method that a result states elsewhere, or that change no number."""

LEFT_OUT = {
    "the fused experts": ("Experts", "ExpertsTransposed"),
    "the layers whose class is derived from nn.Linear": ("LinearSubclass",),
}
"""Kinds of modules that hold most of a model's weights and that a format may not quantize, in words."""

NO_PICTURES = "the traced batch is text alone: with pictures the vision tower runs too, and the peak is higher"

NOTED = 0.01
"""Less than this share of a model is not worth a note."""

OUTSIDE = ("CUDA context",)
"""What is outside torch's allocator, and so in no peak."""

CUDNN_ATTENTION = ("9.0", "10.0")
"""Compute capabilities on which `scaled_dot_product_attention` prefers cuDNN's kernel (torch 2.11 and 2.13, cuDNN 9.19 and 9.20:
`_fused_sdp_choice`, asked on an emulated card). It is counted as the other fused kernels are."""
BY_CUDNN = "what cuDNN's attention takes beyond torch's own kernels"
IN_THREADS = "what threads leave that copy weights to the card while others are quantized (transformers 5.0 to 5.3)"
"""One job, measured twice in one session, reserved 11,880 and 13,272 MiB (`data/runs/fitcheck_t4.jsonl`)."""


def estimate(
    model: Any = None,
    *,
    method: str | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    training_args: Any = None,
    gpu: str | Iterable[str] | None = None,
    context: float | None = None,
    engine: Engine = "analytic",
    script: Script = NO_SCRIPT,
    strict: bool = False,
    advice: AdviceSearch = "best",
    record: bool = False,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Estimate:
    """What fine-tuning `model` needs.

    `model`: a built-in name, a Hub id, a path to a config.json or its folder, a config dict, a transformers
    `PretrainedConfig`, or a loaded model, with or without peft's wrapper, whose dtypes and trainable parameters count too; None
    is the base that `peft_config` names. `method`: a name of `peftplan.methods.METHODS` (default `lora`), or give `peft_config`:
    an adapter_config dict or any peft `PeftConfig`. `quantization_config`: a transformers `BitsAndBytesConfig`.
    `training_args`: a transformers `TrainingArguments` or TRL `SFTConfig`. `gpu`: names of cards, or sizes such as 24GiB;
    `context`: MiB of CUDA context that the verdicts count (None: as measured on the card, else assumed).

    `options`: those of the command line with `_` for `-` (`peftplan estimate --help`; `job.setup.Setup` checks them), such
    as `batch_size` (sequences per device and micro batch), `seq_len` (tokens), `dtype` (`bf16`), `optim`, `trainer`; and the
    method's own fields under peft's names (`r`, `target_modules`, …; `peftplan methods NAME`). Words of other tools, such as
    `lora_rank` or `load_in_4bit`, are accepted for them (`job.words`). An explicit option wins over the objects.

    `script`: facts about a hand-written program. `strict`: every warning becomes an error, such as a name in
    `target_modules` that matches no module. `advice`: `best` looks for the cheapest change that makes the job fit a card, `all`
    for every one. Of the trace engine: `record` keeps the whole run as `peaks.recording`, and `progress` is called with what is
    done now and the share (0 to 1) that is behind.

    Raises InputError, UnknownNameError, RefusedError or MissingExtraError, each with a message of one line.
    """
    if engine not in ("analytic", "trace"):
        raise UnknownNameError("engine", engine, ("analytic", "trace"))
    if advice not in SEARCHES:
        raise UnknownNameError("advice", advice, SEARCHES)
    with named_as_typed({"method": method, **options}) as options:
        method = options.pop("method")
        job = prepare(
            model,
            method=method,
            peft_config=peft_config,
            quantization_config=quantization_config,
            training_args=training_args,
            script=script,
            strict=strict,
            **options,
        )
        check_rank_allocator(job)
        built, static = _static(job.architecture, job.adaptation, job.quant, job.setup)
    cards = find_cards(gpu, context=context)

    def prepared(**changes: Any) -> tuple[Job, parameters.Parameters, Ledger]:
        chosen = {
            "method": method, "peft_config": peft_config, "quantization_config": quantization_config,
            "training_args": training_args, "script": script, **options,
        }  # fmt: skip
        other = prepare(model, **{**chosen, **changes})
        return other, *_static(other.architecture, other.adaptation, other.quant, other.setup)

    def advise_on(on_card: Verdict) -> Advised:
        from peftplan.planning.advice import advise
        from peftplan.planning.trials import trials

        card = next(card for card in cards if card.id == on_card.gpu)
        tried = trials(card, on_card, job.setup, prepared, partial(_analytic, skip_unfit=True))
        return advise(job, tried, everything=advice == "all")

    if engine == "analytic":
        return replace(_analytic(job, built, static, cards), advise=advise_on)
    if (why := without_loss(job.model, job.architecture)) is not None:
        raise RefusedError(why)

    def traced(compute_capability: str) -> Peaks:
        keep = record and compute_capability == capability(cards[0] if cards else None)
        return _traced(job, compute_capability, record=keep, progress=progress)

    return replace(_estimated(job, built, static, cards, traced, engine=engine), advise=advise_on)


def _estimated(
    job: Job,
    built: parameters.Parameters,
    static: Ledger,
    cards: list[Gpu],
    peaks_on: Callable[[str], Peaks | str],
    *,
    engine: Engine,
    skip_unfit: bool = False,
) -> Estimate:
    """The result: peaks and lines are those of the first card, the verdict on each card is from its own.

    `peaks_on`: compute capability → the peaks, or what part of the job has none.
    """
    of_first = capability(cards[0] if cards else None)
    peaks_by_capability = {of: peaks_on(of) for of in dict.fromkeys((of_first, *map(capability, cards)))}
    by_capability = {of: None if isinstance(peaks, str) else peaks for of, peaks in peaks_by_capability.items()}
    peaks = by_capability[of_first]
    standing = static.bytes() if None in by_capability.values() else 0
    assumptions = _assumptions(job, quantized=built.quantized)
    notes = card_notes(cards, job.setup, job.quant)
    if peaks is not None and peaks.assumed.get("images_per_sample") == 0:
        notes.append(NO_PICTURES)
    if notes:
        assumptions["notes"] = [*assumptions.get("notes", ()), *notes]
    if peaks is not None:
        assumptions |= {"compute_capability": of_first, **peaks.assumed}
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
        not_modelled=(f"{peaks_by_capability[of_first]}", *NOT_COUNTED) if peaks is None else _outside(job, peaks_by_capability),
        gpus=tuple(
            verdict(card, standing, by_capability[of], refused=unmet(job.setup, pair(of)), skip_unfit=skip_unfit)
            for card, of in ((card, capability(card)) for card in cards)
        ),
        peaks=peaks,
        warnings=job.warnings,
        chosen=job.chosen,
        asides=job.architecture.asides,
        resize=None if engine == "trace" or peaks is None else partial(_at, job, built, static, cards),
    )


def _analytic(job: Job, built: parameters.Parameters, static: Ledger, cards: list[Gpu], *, skip_unfit: bool = False) -> Estimate:
    """The estimate by formula, without peaks where a part of the job has none.

    `skip_unfit`: no replay for a job whose tensors alone do not fit a card.
    """
    from peftplan.analytic.compiled import kernels
    from peftplan.analytic.engine import analytic_peaks

    peaks_by_kernels: dict[Any, Peaks | str] = {}

    def peaks_on(compute_capability: str) -> Peaks | str:
        if (why := without_loss(job.model, job.architecture)) is not None:
            return why
        try:
            key = kernels(compute_capability)
            if key not in peaks_by_kernels:
                peaks_by_kernels[key] = analytic_peaks(job, built, static, compute_capability=compute_capability)
            return peaks_by_kernels[key]
        except NeedsTraceError as missing:
            return f"{missing}{missing.hint}"

    return _estimated(job, built, static, cards, peaks_on, engine="analytic", skip_unfit=skip_unfit)


def _at(job: Job, built: parameters.Parameters, static: Ledger, cards: list[Gpu], batch_size: Any, seq_len: Any) -> Any:
    """The job at other sizes: an Estimate for whole numbers, a Grid for arrays."""
    b = job.setup.batch_size if batch_size is None else batch_size
    s = job.setup.seq_len if seq_len is None else seq_len

    def at(b: Any, s: Any) -> Job:
        lengths = {} if seq_len is None else {"seq_len": s}
        setup = parse_setup({**job.setup.model_dump(exclude_unset=True), "batch_size": b, **lengths})
        check_length(setup.seq_len, job.architecture.max_positions)
        check_logits_to_keep(setup.logits_to_keep, setup.seq_len)
        return job._replace(setup=setup)

    if not getattr(b, "shape", ()) and not getattr(s, "shape", ()):
        return _analytic(at(b, s), built, static, cards)
    from peftplan.analytic.compiled import Compiled, compiled
    from peftplan.analytic.grid import evaluate

    def compile_at(b: int, s: int) -> Compiled:
        return compiled(at(b, s), built, static, compute_capability=capability(cards[0] if cards else None))

    return evaluate(
        compile_at,
        batch_size=b,
        seq_len=s,
        max_positions=job.architecture.max_positions,
        logits_to_keep=job.setup.logits_to_keep,
    )


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
            on_host=setup.by.adapter_on_host(quantized=quant is not None),
        )
        + parameters.gradient_lines(built, optimizer)
        + _optimizer(built, optimizer, setup)
        + parameters.sensitivity_lines(built)
    )
    return built, static


def _traced(job: Job, compute_capability: str, **how: Any) -> Peaks:
    """The peaks of the trace engine, with the kernels of a card."""
    from peftplan.trace.collector import old_objects_let_be
    from peftplan.trace.traced import trace_peaks, traced_config

    with old_objects_let_be():
        return trace_peaks(
            config_of(job.model, job.setup),
            architecture=job.architecture,
            peft_config=traced_config(job.method, job.config, job.adapter, job.adaptation),
            quant=job.quant,
            setup=job.setup,
            script=job.script,
            compute_capability=compute_capability,
            **how,
        )


def _outside(job: Job, capabilities: Iterable[str]) -> tuple[str, ...]:
    """What no peak holds: kernels of 16 bits that may be cuDNN's on one of the cards, holes that threads leave while loading."""
    setup = job.setup
    low = not {"fp16", "bf16"}.isdisjoint((setup.dtype, setup.autocast))
    by_cudnn = setup.attn_implementation == "sdpa" and low and not set(CUDNN_ATTENTION).isdisjoint(capabilities)
    in_threads = job.quant is not None and job.script.loads_in_threads
    return (*OUTSIDE, *([BY_CUDNN] if by_cudnn else []), *([IN_THREADS] if in_threads else []))


def adapter_dtypes(setup: Setup) -> tuple[str, str | None]:
    """What peft leaves the adapter in, and what the trainer then casts all that trains to: TRL bf16, on a quantized base."""
    if setup.by.casts_adapter(setup.quant) and setup.adapter_dtype == "bf16":
        return "fp32", "bf16"
    return str(setup.adapter_dtype), None


def _optimizer(built: parameters.Parameters, optimizer: Optimizer, setup: Setup) -> Ledger:
    return parameters.optimizer_lines(
        built,
        optimizer,
        parse_optim_args(setup.optim_args),
        by_trainer=setup.by.makes_optimizer,
        target_modules=setup.optim_target_modules,
    )


def model_facts(architecture: Architecture) -> dict[str, Any]:
    """The model facts of a result."""
    return {
        "name": architecture.name,
        "model_type": architecture.model_type,
        "model_class": architecture.model_class,
        "num_parameters": architecture.num_parameters,
        "source": architecture.source,
    }


def config_facts(config: MethodConfig | None, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The method options of a result."""
    return config.model_dump(mode="json", exclude_none=True) if config is not None else dict(adapter)


def _assumptions(job: Job, *, quantized: int) -> dict[str, Any]:
    """Every value that the numbers rest on, defaults included; of the method's fields those that were set."""
    setup, quant, architecture, adaptation = job.setup, job.quant, job.architecture, job.adaptation
    assumed: dict[str, Any] = {"model": architecture.source, "model_class": architecture.model_class}
    unread = OF_TOKENS if architecture.task_type == PICTURES else ()
    assumed |= {key: value for key, value in setup.model_dump(mode="json").items() if value is not None and key not in unread}
    assumed["quant"] = quant.name if quant else "none"
    assumed |= {} if quant is None else quant.options()
    assumed |= {key: list(value) if isinstance(value, tuple) else value for key, value in adaptation.resolved if value}
    if job.method is not None and job.config is not None:
        stated = job.config.model_dump(mode="json", exclude_defaults=True, exclude_none=True, exclude=SAID_ELSEWHERE)
        assumed |= {name: value for name, value in stated.items() if job.method.defaults.get(name) != value}
    ran = {package: getattr(job.script, package) for package in EXAMPLES}
    assumed |= {package: version for package, version in ran.items() if version is not None}
    if adaptation.matched:
        assumed["matched_modules"] = sum(module.copies for module in adaptation.matched)
    notes = [
        *architecture.notes,
        *adaptation.notes,
        *task_notes(job.model, architecture, setup),
        *head_notes(architecture, job.adapter),
    ]
    if quant is not None:
        assumed["quantized_parameters"] = quantized
        notes += unquantized(architecture, quant, cast=bool(setup.kbit_prepare) and quant.name in parameters.PREPARED)
    return assumed | ({"notes": notes} if notes else {})


def unquantized(architecture: Architecture, quant: QuantConfig, *, cast: bool) -> list[str]:
    """A common surprise: formats that replace linear layers leave fused experts and subclasses of `nn.Linear` (Falcon's)
    unquantized, and peft's `prepare_model_for_kbit_training` casts them to fp32 with everything else that is not quantized.
    """
    then = ", and prepare_model_for_kbit_training casts them to fp32 (--no-kbit-prepare)" if cast else ""
    notes = []
    for what, kinds in LEFT_OUT.items():
        left = [m for m in architecture.modules if m.kind in kinds and m.kind not in CONVERTED_KINDS[quant.name]]
        count = sum(m.copies * prod(shape) for m in left for _, shape in m.params)
        share = count / architecture.num_parameters
        if share >= NOTED:
            notes.append(f"{quant.name} leaves {what} ({count:,} parameters, {share:.0%} of the model) unquantized{then}")
    return notes
