"""`trace`: runs a real training step of the real model on fake tensors, and logs the memory of each phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from peftplan.depth.expand import NotRepeatingError, Sample, grown
from peftplan.depth.shallow import Stack, has_prefix, names_layers, with_layers
from peftplan.distributed.strategy import Distributed
from peftplan.errors import PeftplanError, RefusedError
from peftplan.hardware.context import DEFAULT_CAPABILITY
from peftplan.hardware.processors import Processors, processors
from peftplan.job.prepare import ROUTER, wide_ends
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.setup import Setup
from peftplan.libraries.alike import repeating_stacks
from peftplan.libraries.quantized import fused_on
from peftplan.storage import QuantConfig
from peftplan.storage.fused_products import Chip
from peftplan.trace.collector import old_objects_let_be
from peftplan.trace.cuda import losses
from peftplan.trace.cuda.attention import Capability
from peftplan.trace.cuda.ctc import ctc_on_cuda
from peftplan.trace.cuda.differences import as_on_cuda, kernel_temporaries
from peftplan.trace.cuda.dispatcher import attention_on, dispatched_as_on_cuda
from peftplan.trace.cuda.experts import experts_on
from peftplan.trace.cuda.flash import flash_attn_installed
from peftplan.trace.cuda.hosted import counted_host
from peftplan.trace.cuda.kernels import kernel_packages
from peftplan.trace.cuda.selected import Selected
from peftplan.trace.cuda.tuner_layers import adapter_from_host, on_fake_tensors
from peftplan.trace.events.peaks import peaks, windows
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.events.workspaces import Workspaces
from peftplan.trace.fake import FakeOn, fake_batch, fake_device, to_fake
from peftplan.trace.fake_mode import DenseMode
from peftplan.trace.inputs import Inputs, inputs
from peftplan.trace.model import Built, build, freeze_numbers_of_ranks
from peftplan.trace.peft_steps import WithAllocator, allocator_of
from peftplan.trace.progress import Tell, part, silent
from peftplan.trace.ranks import rank_of
from peftplan.trace.ranks.one_gpu import OneGpu
from peftplan.trace.reasons import reason
from peftplan.trace.result import Traced
from peftplan.trace.scripted import cache_rotary
from peftplan.trace.steps import STEPS, Run, phases_begun, take_steps


def trace(
    config: Mapping[str, Any],
    *,
    task_type: str | None = None,
    peft_config: Any = None,
    quant: QuantConfig | None = None,
    setup: Setup,
    device: Capability | None = None,
    multiprocessors: int | None = None,
    script: Script = NO_SCRIPT,
    distributed: Distributed | None = None,
    rank: int = 0,
    full_depth: bool = False,
    fake_on: FakeOn = "auto",
    progress: Tell | None = None,
) -> Traced:
    """The trace of one GPU, or of one `rank` of several; see `traces`."""
    return next(
        traces(
            config, task_type=task_type, peft_config=peft_config, quant=quant, setup=setup, device=device,
            multiprocessors=multiprocessors, script=script, distributed=distributed, ranks=(rank,), full_depth=full_depth,
            fake_on=fake_on, progress=progress,
        )
    )  # fmt: skip


def traces(
    config: Mapping[str, Any],
    *,
    task_type: str | None = None,
    peft_config: Any = None,
    quant: QuantConfig | None = None,
    setup: Setup,
    device: Capability | None = None,
    multiprocessors: int | None = None,
    script: Script = NO_SCRIPT,
    distributed: Distributed | None = None,
    ranks: Sequence[int] = (0,),
    full_depth: bool = False,
    fake_on: FakeOn = "auto",
    progress: Tell | None = None,
) -> Iterator[Traced]:
    """Run two optimizer steps of the model of a Hugging Face `config` on fake tensors, three of a full fine-tuning.

    `peft_config`: a peft config object, an adapter_config dict, or the `Adaptation` of a method that peft lacks; None trains all
    parameters. `setup` is resolved (`job.resolving.resolved`). `device` is a compute capability: it decides kernels;
    with `multiprocessors` it decides which products with 4-bit weights are fused and the size of some buffers (`processors`).
    `script`: what the program did besides, and with which versions; its emptied caches and its allocator are the replay's.
    `distributed`: the strategy of which each of `ranks` is traced; None for one GPU.
    A model of identical layers is traced at two small depths and its log made from them, unless `full_depth`. `fake_on`: see
    `fake.fake_device`. `progress` is told what runs and how much is done.
    Raises RefusedError for what cannot be traced.
    """
    on = fake_device("cpu" if distributed else fake_on)
    capability = device or DEFAULT_CAPABILITY
    card = processors(".".join(map(str, capability)), multiprocessors)
    run = partial(
        _run, task_type=task_type, peft_config=peft_config, quant=quant, setup=setup,
        capability=capability, card=card, script=script, on=on,
    )  # fmt: skip
    tell = progress or silent
    period = setup.every_n_layers or 1
    by_layer = full_depth or names_layers(peft_config, quant.skip_modules if quant else None)
    stacks = () if by_layer else repeating_stacks(config, task_type=task_type, period=period)
    if len(stacks) > 1 and has_prefix(peft_config):  # made for as many layers as the encoder has, and read by the decoder
        stacks = ()
    model = rank_of(distributed).model_alone(setup) if stacks else None
    with old_objects_let_be():
        alone = None if model is None else _by_stacks(partial(run, rank=model), config, stacks, tell)
        for rank in ranks:
            one = rank_of(distributed, rank)
            one.model, one.stacks = alone, one.extended(stacks, config, setup, quant)
            with one.world():
                yield one.apart(_of_rank(partial(run, rank=one), config, one, tell))


def _of_rank(run: Callable[..., Traced], config: Mapping[str, Any], rank: OneGpu, tell: Tell) -> Traced:
    """The trace of a rank, in full where it finds that its log does not repeat."""
    try:
        return _completed(_by_stacks(run, config, rank.stacks, tell), rank)
    except NotRepeatingError:
        rank.stacks = ()
        return _completed(run(config, tell=tell), rank)


def _completed(traced: Traced, rank: OneGpu) -> Traced:
    """The trace of the whole depth, with what does not repeat with the layers."""
    log, began = rank.complete(traced.log, traced.began)
    if log is traced.log:
        return traced
    counted = windows(began, length=len(log), started=traced.started)
    return replace(traced, log=tuple(log), began=tuple(began), windows=counted, peaks=peaks(log, counted))


def _by_stacks(run: Callable[..., Traced], config: Mapping[str, Any], stacks: tuple[Stack, ...], tell: Tell) -> Traced:
    """The trace of a model, with each repeating stack extended from two small depths. Others are traced in full."""
    if not stacks:
        return run(config, tell=tell)
    stack, *rest = stacks
    small, large = (
        _by_stacks(run, with_layers(config, stack, layers), tuple(rest), part(tell, number=number, of=len(stack.samples)))
        for number, layers in enumerate(stack.samples)
    )
    try:
        return _deepened(small, large, stack=stack)
    except NotRepeatingError:
        return _by_stacks(run, config, tuple(rest), tell)


def _deepened(small: Traced, large: Traced, *, stack: Stack) -> Traced:
    """The trace of the full depth, from two traces that differ by one period. Everything is linear in the number of periods."""
    samples = [
        Sample.of(sample.log, list(sample.began), layers=depth, stack=stack.name, period=stack.period, reach=stack.reach)
        for sample, depth in zip((small, large), stack.samples, strict=True)
    ]
    deep = grown(*samples, layers=stack.layers)
    more = (stack.layers - stack.samples[1]) // stack.period
    counted = windows(deep.began, length=len(deep.log), started=large.started)
    return replace(
        large,
        peaks=peaks(deep.log, counted),
        num_trainable=large.num_trainable + more * (large.num_trainable - small.num_trainable),
        num_total=large.num_total + more * (large.num_total - small.num_total),
        log=deep.log,
        windows=counted,
        began=tuple(deep.began),
        managed_bytes=large.managed_bytes + more * (large.managed_bytes - small.managed_bytes),
        host_bytes=large.host_bytes + more * (large.host_bytes - small.host_bytes),
        depths=stack.samples,
    )


def _run(
    config: Mapping[str, Any],
    *,
    task_type: str | None,
    peft_config: Any,
    quant: QuantConfig | None,
    setup: Setup,
    capability: Capability,
    card: Processors,
    script: Script,
    on: torch.device,
    rank: OneGpu,
    tell: Tell,
) -> Traced:
    """One trace of this model as it is."""
    tell("making the model", 0.0)
    ends = setup.keeps_ends_wide and peft_config is None and rank.alone
    wide = wide_ends(config["model_type"], setup.by.other_heads) if ends else ()
    if not ends and setup.by.wide_ends and quant is None and rank.whole:
        wide = (ROUTER,)
    built = build(config, task_type=task_type, peft_config=peft_config, quant=quant, setup=setup, wide=wide, divide=rank.divided)
    if script.freezes_ranknum:
        freeze_numbers_of_ranks(built.model)
    if script.caches_rotary(built.hf_config.model_type):
        cache_rotary(built.base, str(setup.dtype))
    step_inputs = inputs(built.base, setup)
    earlier = [inputs(built.base, setup.model_copy(update={"seq_len": length})) for length in script.earlier_seq_lens]
    # gradients of the whole model, pictures and sound may find other places in the third step
    large = peft_config is None or any(torch.is_floating_point(x) for x in step_inputs.batch.values() if torch.is_tensor(x))
    again = large and (rank.alone or setup.loss == "trl-chunked") and not earlier and not setup.keep_gradients
    steps = max(STEPS, len(earlier) + 1) + rank.more_steps + again
    setup_of_step = rank.prepared(built, setup)
    losses.ask_for_load_loss(built.base.config.get_text_config(), setup)
    losses.install(built.base, loss=setup.loss, prompt=losses.prompt_tokens(built.model), capability=capability)
    losses.install_older(built.base, script)
    lengths = step_inputs.tokens.union(*(of_step.tokens for of_step in earlier))
    workspaces = Workspaces(capability, apart=script.cublaslt_apart, by_rotary=script.rotary_by_product)
    tracker = _tracker(built, replace(step_inputs, tokens=lengths), setup, workspaces, rank.tracker, card)
    tracker.on_begin = lambda: tell(tracker.phase, (len(tracker.began) - 1) / phases_begun(setup, steps))
    mode = DenseMode(allow_non_fake_inputs=True)
    selected = None if step_inputs.selected is None else Selected(step_inputs.selected)
    tracker.known = mode.known if selected is None else partial(selected.known, mode.known)
    tracker.below = 1 if selected is None else 2
    to_fake(built.model, mode, rank.device_of(built, on))
    with (
        rank.started(tracker),
        _as_on_card(mode, capability, card, device=on.type),
        nullcontext() if selected is None else selected,
        tracker,
        fused_on(None if script.dequantizes_4bit else Chip(*capability, card.number), keeps_inputs=script.keeps_4bit_inputs),
        on_fake_tensors(from_host=adapter_from_host(setup, quant)),
        counted_host() as host,
    ):
        rank.load(built, tracker, setup, quant)
        tracker.watch(rank.watched(built))
        optimizer = rank.stepping(built, tracker, setup)
        if script.updates_ranks(setup) and allocator_of(built.model) is not None:
            optimizer = WithAllocator(optimizer, built.model, tracker)
        if script.enables_adapters_again:
            with getattr(built.model, "disable_adapter", nullcontext)():  # modules that peft did not adapt have none
                pass
        run = Run(built.model, step_inputs.batch, optimizer, tracker, setup_of_step, script)
        run.fetched = partial(fake_batch, mode=mode, device=on)
        run.called, run.prepared, run.unscales_fp16 = rank.called(built), rank.prepares, rank.unscales_fp16
        run.begin_batch = rank.batches(built)
        run.earlier, run.steps, run.reported = [of_step.batch for of_step in earlier], steps, 1 + again
        try:
            take_steps(run)
        except PeftplanError:
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"in {tracker.phase} of the trace, after {tracker.last_module or 'loading'}") from None
        except Exception as error:  # any operation of any model
            where = f" in {tracker.last_module}" if tracker.last_module else ""
            raise RefusedError(f"trace: {tracker.phase} fails{where}: {reason(error)}") from error
        log = tuple(tracker.log)
    counted = windows(tracker.began, length=len(log), started=run.started)
    return Traced(
        peaks=peaks(log, counted),
        num_trainable=built.num_trainable,
        num_total=built.num_total,
        log=log,
        windows=counted,
        began=tuple(tracker.began),
        started=run.started,
        managed_bytes=getattr(optimizer, "managed_bytes", 0),
        unknown_ops=dict(tracker.data_dependent),
        facts={**step_inputs.facts, **losses.facts(setup.loss)},
        replaced=kernel_packages(built.base),
        host_bytes=host.most,
        device_of=getattr(tracker, "device_of", {}),
        prepared=quant is not None and bool(setup.kbit_prepare),
    )


@contextmanager
def _as_on_card(mode: DenseMode, capability: Capability, card: Processors, *, device: str) -> Iterator[None]:
    """Fake tensors, with torch, transformers and flash-attn behaving as on a card."""
    with (
        mode,
        attention_on(capability, card),
        dispatched_as_on_cuda() if device == "cpu" else nullcontext(),
        as_on_cuda(device),
        flash_attn_installed(),
        experts_on(capability),
        ctc_on_cuda(),
    ):
        yield


def _tracker(
    built: Built, step_inputs: Inputs, setup: Setup, workspaces: Workspaces, kind: type[Tracker], card: Processors
) -> Tracker:
    tokens = _token_counts(built, step_inputs, setup)
    vocab = getattr(built.hf_config.get_text_config(decoder=True), "vocab_size", None)

    parts = losses.tiles(setup.loss, tokens=tokens, config=built.hf_config)

    def is_logits(tensor: torch.Tensor) -> bool:
        whole = tensor.dim() > 1 and tensor.shape[-1] == vocab and tensor.numel() // vocab in tokens
        return whole or tuple(tensor.shape) in parts

    tracker = kind(
        is_logits=is_logits,
        scalar=lambda tensor: _scalar(tensor, tracker.made_by(tensor), padding=setup.padding and not tracker.of_ones(tensor)),
        temporaries=kernel_temporaries(card),
        after=workspaces.after,
    )
    return tracker


def _token_counts(built: Built, step_inputs: Inputs, setup: Setup) -> set[int]:
    """How many rows a tensor over the vocabulary can have: the tokens of the batch, virtual ones included."""
    peft_config = getattr(built.model, "active_peft_config", None)
    virtual = getattr(peft_config, "num_virtual_tokens", None) or 0
    return {setup.batch_size * (length + extra) for length in step_inputs.tokens for extra in (0, virtual)}


def _scalar(tensor: torch.Tensor, op: str, *, padding: bool) -> Any:
    """The value of a fake scalar. A mask's `all()`: whether there is no padding; a step counter: 1; a random number: 0.

    Any other comparison guards against bad input, such as a label beyond the vocabulary. The batch has none.
    """
    if tensor.dtype == torch.bool:
        return not padding if "all" in op else False
    if "randint" in op:
        return 0
    return 1.0 if tensor.is_floating_point() else 1
