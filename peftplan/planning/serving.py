"""`serving`: what a fine-tuned model needs after training. Composition only; the sums are in `peftplan.deployment`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftplan.deployment import adapter_file, kv_cache, residents
from peftplan.deployment.decoding import step_bytes
from peftplan.dtypes import MODEL_DTYPES, parse_dtype
from peftplan.errors import InputError, MissingExtraError, NeedsTraceError, RefusedError
from peftplan.job.adapting import config_of
from peftplan.job.inventory import adapter_dtypes
from peftplan.job.job import Job
from peftplan.job.prepare import prepare
from peftplan.job.setup import Count
from peftplan.job.tasks import rotary_positions
from peftplan.job.words import named_as_typed
from peftplan.planning.assumed import config_facts, model_facts, unquantized
from peftplan.planning.finished import (
    LOADED_ADAPTER_DTYPE,
    AdapterFile,
    checkpoint_of,
    file_of,
    loaded_parameters,
    merges_of,
    peft_type_of,
    quantized_merge,
    shown_name,
)
from peftplan.planning.serving_result import KV_CACHE, LEFT_OUT, OF_A_CARD, Cache, Loaded, Serving
from peftplan.planning.serving_room import MOST_ADAPTERS, MOST_TOKENS, Served, verdict_on
from peftplan.planning.verdicts import find_cards
from peftplan.validation import first_error

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from peftplan.job.options import Options
    from peftplan.results.documents import Assumptions

Value = TypeVar("Value")


class Request(BaseModel):
    """What is served: how many adapters beside one base, to how many sequences with how many tokens in the cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: Annotated[int, Field(ge=1, le=2**20)] = 1
    batch_size: Count = 1
    context: Count
    encoder_context: Count | None = None
    serving_dtype: str


def serving(
    model: object = None,
    *,
    method: str | None = None,
    peft_config: object = None,
    quantization_config: object = None,
    adapters: int = 1,
    context: int | None = None,
    encoder_context: int | None = None,
    serving_dtype: object = None,
    merge: bool = False,
    gpu: str | Iterable[str] | None = None,
    **options: Unpack[Options],
) -> Serving:
    """What `model`, fine-tuned with `method`, needs on disk, in a merge, and while it is served.

    - `model`, `method`, `peft_config`, `quantization_config` and `options`: as for `estimate`; they also decide the dtypes of the
      saved adapter.
    - `adapters`: adapters of one shape that are served beside one base, in `serving_dtype` (None: that of the base).
    - `batch_size`: sequences in the KV cache, with `context` tokens each (None: `seq_len`, 2048 or the model's maximum) and
      `encoder_context` tokens in the encoder (None: as many).
    - `gpu`: names of cards, or sizes such as 24GiB. Each gets a verdict, and the number of adapters, tokens and sequences that
      fit.
    - `merge`: raise RefusedError if the method cannot be merged. Other errors are those of `estimate`.
    """
    with named_as_typed({"method": method, **options}) as our_options:
        batch_size = our_options.pop("batch_size", None)
        job = prepare(model, peft_config=peft_config, quantization_config=quantization_config, **our_options)
    dtype = job.setup.dtype if serving_dtype is None else serving_dtype
    request = _request(
        adapters=adapters,
        batch_size=1 if batch_size is None else batch_size,
        context=job.setup.seq_len if context is None else context,
        encoder_context=encoder_context,
        serving_dtype=parse_dtype(dtype, field="serving_dtype", accepted=MODEL_DTYPES),
    )
    if request.adapters > 1 and job.adaptation.trained:
        raise RefusedError(
            f"adapters: {shown_name(job)} changes parameters of the base itself, so only one is served by it; accepted: 1"
        )
    most = job.architecture.max_positions
    if most is not None and request.context > most:
        raise InputError("context", request.context, f"accepted: up to {most}, the positions of the model")
    refused: dict[str, str] = {}
    file = _unless_refused(refused, "adapter_file", lambda: file_of(job, {**job.adapter, **our_options}))
    merged = _unless_refused(refused, "merged_checkpoint", lambda: checkpoint_of(job))
    merges = _unless_refused(refused, "merge_memory", lambda: merges_of(job), required=merge) or ()
    if merges and job.quant is not None:
        quantized = _unless_refused(refused, "merge_memory.gpu_quantized", lambda: quantized_merge(job))
        merges = (*merges, quantized) if quantized else merges
    cache = _unless_refused(refused, "kv_cache", lambda: _cache(job, request))
    loaded, cards = _resident(job, request, file), find_cards(gpu)
    served = _served(job, request, loaded, cache) if cards else None
    uncounted = cache is None and job.architecture.task_type in kv_cache.GENERATES
    return Serving(
        model=model_facts(job.architecture),
        method={"name": shown_name(job), "config": config_facts(job.config, job.adapter)},
        file=file,
        checkpoint=merged,
        merges=merges,
        loaded=loaded,
        cache=cache,
        refused=refused,
        assumptions=_assumptions(job, request, merges=bool(merges)),
        not_modelled=(*((KV_CACHE,) if uncounted else ()), *(() if cards else OF_A_CARD), *LEFT_OUT),
        gpus=tuple(verdict_on(card, served) for card in cards) if served else (),
    )


def _request(**values: object) -> Request:
    try:
        return Request.model_validate(values)
    except ValidationError as error:
        raise first_error(error) from None


def _unless_refused(refused: dict[str, str], part: str, make: Callable[[], Value], *, required: bool = False) -> Value | None:
    """The part, or None with the reason in `refused`; a required part raises."""
    try:
        return make()
    except (RefusedError, MissingExtraError) as reason:
        if required:
            raise
        refused[part] = str(reason)
        return None


def _resident(job: Job, request: Request, file: AdapterFile | None) -> Loaded:
    dtype = request.serving_dtype
    loaded = loaded_parameters(job, adapter_dtype=dtype, quant=job.quant)
    prompt = next((t for t in (file.tensors if file else ()) if t.name == adapter_file.PROMPT_KEY), None)
    return Loaded(
        base=residents.base_bytes(job.architecture, loaded, dtype=job.setup.dtype, device="gpu"),
        adapter=residents.adapter_bytes(job.adaptation, loaded, dtype=dtype, device="gpu")
        if prompt is None
        else residents.prompt_bytes(prompt, loaded, dtype=dtype, device="gpu"),
        shared=residents.shared_bytes(job.adaptation, dtype=dtype, device="gpu"),
        adapters=request.adapters,
    )


def _served(job: Job, request: Request, loaded: Loaded, cache: Cache | None) -> Served:
    """What a card is asked to take. A cache that only a run of the model counts is left at the size that was asked for."""
    counted = cache is not None and any(block.stack == "decoder" for block in job.architecture.blocks)
    positions = job.architecture.max_positions or rotary_positions(job.model, job.architecture) or MOST_TOKENS

    def cache_at(batch_size: int, context: int) -> Cache | None:
        sizes = {"batch_size": batch_size, "context": context}
        return _cache(job, request.model_copy(update=sizes)) if counted else cache

    return Served(
        loaded=loaded,
        batch_size=request.batch_size,
        context=request.context,
        cache_at=cache_at,
        step_at=lambda cache, sequences: step_bytes(job.architecture, cache.tensors, batch_size=sequences, dtype=job.setup.dtype),
        adapters_bound=MOST_ADAPTERS if loaded.adapter and not job.adaptation.trained else None,
        context_bound=max(positions, request.context) if counted else None,
    )


def _cache(job: Job, request: Request) -> Cache:
    """With the virtual tokens of the method: in the decoder's cache, or before the encoder's input where there is one.

    A model whose attention has no description here is run without weights by the installed transformers.
    """
    virtual = int(getattr(job.config, "num_virtual_tokens", 0))
    in_encoder = job.architecture.task_type == "SEQ_2_SEQ_LM" and peft_type_of(job) != "PREFIX_TUNING"
    context = request.context + (0 if in_encoder else virtual)
    encoder = (request.encoder_context or request.context) + (virtual if in_encoder else 0)
    arch, size, dtype = job.architecture, request.batch_size, job.setup.dtype
    try:
        tensors = kv_cache.kv_cache(arch, batch_size=size, context=context, encoder_context=encoder, dtype=dtype)
    except NeedsTraceError:
        from peftplan.libraries.cache import traced_cache

        config = config_of(job.model, job.setup)
        try:
            tensors = traced_cache(config, task_type=arch.task_type, batch_size=size, context=context, dtype=dtype)
        except MissingExtraError as missing:
            what = f"the KV cache is not in the sum: counting that of {arch.model_type}"
            raise MissingExtraError(what, missing.extra) from None
    return Cache(tensors, context)


def _assumptions(job: Job, request: Request, *, merges: bool) -> Assumptions:
    """Every value that the numbers rest on."""
    _, trained_dtype = adapter_dtypes(job.setup)
    arch = job.architecture
    assumed: dict[str, object] = {"model": arch.source, "model_class": arch.model_class, "dtype": job.setup.dtype}
    assumed |= {"quant": job.quant.name if job.quant else "none"}
    options = job.quant.options() if job.quant else {}
    assumed |= {name: value for name, value in options.items() if name != "compute_dtype"}
    assumed |= {"trainer": job.setup.trainer, "adapter_dtype": trained_dtype or job.setup.adapter_dtype}
    assumed |= {"merge_adapter_dtype": LOADED_ADAPTER_DTYPE} if merges else {}
    assumed |= request.model_dump(exclude={"encoder_context"})
    if arch.task_type == "SEQ_2_SEQ_LM":
        assumed["encoder_context"] = kv_cache.encoder_positions(arch) or request.encoder_context or request.context
    assumed |= {key: list(value) if isinstance(value, tuple) else value for key, value in job.adaptation.resolved if value}
    notes = [*job.warnings, *arch.notes, *job.adaptation.notes]
    if job.quant is not None:
        notes += unquantized(arch, job.quant, cast=False)
    return cast("Assumptions", assumed | ({"notes": notes} if notes else {}))
