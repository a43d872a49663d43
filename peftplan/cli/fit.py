"""`peftplan fit MODEL`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from peftplan.cli import options, texts
from peftplan.cli.command import INT, METHOD_HEADING, Command, argument, option, will_exit
from peftplan.errors import RefusedError, quoted

if TYPE_CHECKING:
    from peftplan.planning.fit import Size

SIZES: dict[str, Size] = {"batch-size": "batch_size", "seq-len": "seq_len", "r": "r", "model": "model"}


@click.command("fit", cls=Command)
@argument("model", required=False)
@option(
    "--gpu",
    "gpu",
    multiple=True,
    metavar="NAME",
    help="a card, a size such as 24GiB, or 8xh100; repeatable, one answer each",
)
@option(
    "--max",
    "size",
    default="batch-size",
    metavar="[batch-size|seq-len|r|model]",
    show_default=True,
    help="what to maximize",
)
@option("--methods", default=None, metavar="NAMES", help="other methods to try, comma-separated; default: all ranked ones")
@option(
    "--keep",
    default=None,
    metavar="OPTIONS",
    help="what no plan may change: method, seq-len, trainer, loss, gradient-checkpointing, eval-batch-size",
)
@option("--min-seq-len", type=INT, default=None, metavar="INT", help="plans may shorten sequences down to this many tokens")
@option("--allow-tight", is_flag=True, help="a plan may leave less than 5 % of the card")
@option("--which-gpu", is_flag=True, help="list the smallest cards that the job as typed fits, instead of plans")
@option("--model-family", default=None, metavar="NAME", help="find the largest model of a family (qwen3, …) with each method")
@option("--require-fit", is_flag=True, help="exit 1 if the job as typed does not fit at any size")
@options.engine_option
@options.group(METHOD_HEADING, texts.METHOD)
@options.group("Model", texts.MODEL)
@options.group("Precision and storage", texts.STORAGE)
@options.group("Training", texts.TRAINING)
@options.group("Preferences and RL", texts.PREFERENCES)
@options.group("Several GPUs", texts.GPUS)
@options.torch_option
@options.transformers_option
@options.context_option
@options.format_option
def command(
    model: str | None,
    gpu: tuple[str, ...],
    size: str,
    methods: str | None,
    keep: str | None,
    min_seq_len: int | None,
    allow_tight: bool,
    which_gpu: bool,
    model_family: str | None,
    require_fit: bool,
    engine: str,
    fmt: str,
    torch: str | None,
    transformers: str | None,
    context: str | None,
    **fields: object,
) -> int:
    """The largest size of a job that fits a card, and other plans that fit.

    Without MODEL, --peft-config names its base model. With --max model, MODEL is a family such as qwen3, a pattern of built-in
    names, or a comma-separated list. With --engine trace, fit traces a few sizes of the job, as typed and with each of --methods.

    \b
    peftplan fit llama-3.1-8b --gpu rtx-4090 --method lora --seq-len 4096
    peftplan fit qwen3-8b --gpu 24GiB --max seq-len --method qlora --keep method
    peftplan fit qwen3 --gpu rtx-4090,l40s --max model
    peftplan fit llama-2-7b --method full --which-gpu
    peftplan fit --model-family qwen3 --gpu rtx-4090
    """
    options.check_format(fmt)
    gpus, number = options.counted(gpu, fields)
    chosen = options.chosen(fields | number) | options.circumstances(torch, transformers, context)
    from peftplan.report import render

    cards_named = ",".join(gpus) or None
    of_plans = {"--max": None if size == "batch-size" else size, "--keep": keep, "--min-seq-len": min_seq_len}
    if model_family is not None:
        from peftplan.planning.choosing import family

        _check(gpu=cards_named, model=model, of_family=True)
        if size == "model":
            del of_plans["--max"]  # a family is asked for its largest member anyway
        _refuse("--model-family", "names the largest member for each method", {**of_plans, "--which-gpu": which_gpu or None})
        method = chosen.pop("method", None)
        methods = methods or method
        with options.computed_by(engine) as by_engine:
            members = family(
                model_family, gpu=str(cards_named), allow_tight=allow_tight, methods=_names(methods), **by_engine, **chosen
            )
        code = will_exit(1 if require_fit and not any(member.model for member in members) else 0)
        render.members(members, fmt=fmt, gpu=str(cards_named))
        return code
    if model is None and fields["peft_config"] is None:
        raise RefusedError("MODEL is missing: name a model, a --peft-config with its base model, or --model-family NAME")
    if which_gpu:
        from peftplan.planning.choosing import which_gpu as cards_for

        if cards_named is not None:
            raise RefusedError("--which-gpu finds the card and takes no --gpu")
        _refuse("--which-gpu", "lists cards for the job as typed", {**of_plans, "--methods": methods})
        with options.computed_by(engine) as by_engine:
            cards = cards_for(model, allow_tight=allow_tight, **by_engine, **chosen)
        code = will_exit(1 if require_fit and not cards else 0)
        render.cards(cards, fmt=fmt)
        return code
    _check(gpu=cards_named, model=None, of_family=False)
    if size not in SIZES:
        from peftplan.errors import UnknownNameError

        raise UnknownNameError("--max", size, SIZES)
    if (typed := chosen.get(SIZES[size])) is not None:
        click.echo(f"peftplan: --{size} {typed} is not used: it is the size that --max searches", err=True)
    from peftplan.planning.fit import fit

    with options.computed_by(engine) as by_engine:
        results = fit(
            model,
            gpu=gpus,
            max=SIZES[size],
            keep=(keep or "").split(",") if keep else (),
            min_seq_len=min_seq_len,
            allow_tight=allow_tight,
            **by_engine,
            methods=_names(methods),
            **chosen,
        )
    code = will_exit(1 if require_fit and not all(result.fits for result in results) else 0)
    render.fits(results, fmt=fmt)
    return code


def _check(*, gpu: str | None, model: str | None, of_family: bool) -> None:
    if gpu is None:
        raise RefusedError("--gpu is missing: name a card, such as --gpu rtx-4090, or find one with --which-gpu")
    if of_family and model is not None:
        raise RefusedError(f"--model-family takes the place of MODEL (got {quoted(model)}): give one of the two")


def _refuse(option: str, does: str, others: Mapping[str, object]) -> None:
    """Refuse options of plans beside one that asks for none."""
    for name, value in others.items():
        if value is not None:
            raise RefusedError(f"{name} has no effect with {option}, which {does}")


def _names(methods: str | None) -> tuple[str, ...] | None:
    return None if methods is None else tuple(name.strip() for name in methods.split(","))
