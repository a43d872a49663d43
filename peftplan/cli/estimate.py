"""`peftplan estimate MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from peftplan.cli import options, texts
from peftplan.cli.command import METHOD_HEADING, Command, argument, option, will_exit
from peftplan.errors import RefusedError

if TYPE_CHECKING:
    from peftplan.job.setup import AdviceSearch

VERDICTS = """\
A job needs the bytes that torch's allocator reserves if memory is unlimited, plus the CUDA context. If the card's context is not
known, the largest one measured on its generation is assumed, or else the largest of all. The verdicts:

\b
fits           at least 5 % of the usable bytes are left
tight          less is left, or it needs more than is usable and runs only because
               the allocator releases cached memory
does not fit   it runs out of memory
does not run   a library raises, or has no kernel for the card
unknown        no peak is known, or only a lower bound that fits
"""


@click.command("estimate", cls=Command, epilog=VERDICTS)
@argument("model", required=False)
@options.group(METHOD_HEADING, texts.METHOD)
@options.group("Model", texts.MODEL)
@option(
    "--config",
    "config",
    multiple=True,
    metavar="FILE",
    heading="Model",
    help="a training config of axolotl, TRL, Unsloth, …; repeatable",
)
@option(
    "--tool",
    default=None,
    rare=True,
    metavar="NAME",
    heading="Model",
    help="the tool of --config, if the file does not show it",
)
@options.group("Precision and storage", texts.STORAGE)
@options.group("Training", texts.TRAINING)
@options.group("Preferences and RL", texts.PREFERENCES)
@options.group("Several GPUs", texts.GPUS)
@options.torch_option
@options.transformers_option
@options.engine_option
@option("--gpu", "gpu", multiple=True, metavar="NAME", help="a card, a size (24GiB) or 8xh100; repeatable")
@options.context_option
@option(
    "--advice",
    rare=True,
    default="best",
    metavar="[best|all]",
    show_default=True,
    help="look for changes that make the job fit the nearest card; all tries every combination",
)
@option("--require-fit", is_flag=True, help="exit 1 unless the job fits every --gpu")
@option("--allow-tight", is_flag=True, rare=True, help="let --require-fit accept tight too")
@option("--text-only", is_flag=True, rare=True, help="let --require-fit accept a verdict for text only, without images")
@option("--strict", is_flag=True, rare=True, help="turn warnings into errors, such as a target name that matches no module")
@options.format_option
@option(
    "--explain",
    is_flag=True,
    rare=True,
    help="print only the lines of the peak, each as a formula with its numbers and source",
)
@option("--explain-peak", is_flag=True, rare=True, help="the largest tensors alive at the peak (all of them with -v)")
@option(
    "--timeline",
    default=None,
    rare=True,
    metavar="FILE",
    help="memory over one optimizer step as FILE.png, .html, or .json (for replay)",
)
@option(
    "-v",
    "--verbose",
    is_flag=True,
    help="every byte, line, formula, source and assumption; advice for every card",
)
def command(
    model: str | None,
    config: tuple[str, ...],
    tool: str | None,
    fmt: str,
    verbose: bool,
    require_fit: bool,
    allow_tight: bool,
    text_only: bool,
    gpu: tuple[str, ...],
    context: str | None,
    engine: str,
    advice: str,
    torch: str | None,
    transformers: str | None,
    explain: bool,
    explain_peak: bool,
    timeline: str | None,
    **raw: object,
) -> int:
    """What fine-tuning MODEL needs.

    MODEL is a built-in name (`peftplan models`), a Hub id, or a path to a config.json or its folder. Without it, --config or
    --peft-config names it.

    \b
    peftplan estimate llama-2-70b --method qlora --r 16
    peftplan estimate ./config.json --method dora --target-modules q_proj,v_proj --gpu l4

    Each --gpu gets a verdict: fits, tight, does not fit, does not run or unknown (--help-all defines them).
    """
    options.check_format(fmt)
    if not config:
        options.check_model(model, raw, also="a --config that names one, or ")
        if tool is not None:
            raise RefusedError("--tool needs a --config")
    if explain and fmt != "table":
        raise RefusedError(f"--explain prints text; --format {fmt} without it has each line's formula (markdown: with -v)")
    if require_fit and not gpu:
        raise RefusedError("--require-fit needs a card (--gpu)")
    if (allow_tight or text_only) and not require_fit:
        raise RefusedError(f"{'--allow-tight' if allow_tight else '--text-only'} needs --require-fit")
    if timeline is not None:
        from peftplan.report.timeline import check

        check(timeline)
    from peftplan.planning.estimate import estimate

    job = options.chosen(raw) | options.circumstances(torch, transformers, context)
    with options.computed_by(engine) as by_engine:
        results = [
            estimate(
                model,
                config=config or None,
                tool=tool,
                gpu=names,
                advice=cast("AdviceSearch", advice),
                record=timeline is not None,
                **by_engine,
                **job,
            )
            for names in _by_number(gpu)
        ]
    if timeline is not None:
        from peftplan.report.timeline import write

        write(results[0], timeline)
    from peftplan.planning.verdicts import all_fit
    from peftplan.report import render

    cards = [verdict for result in results for verdict in result.gpus]
    runs = not any(result.config and result.config["refused"] for result in results)
    fit = not require_fit or (runs and all_fit(cards, allow_tight=allow_tight, text_only=text_only))
    code = will_exit(0 if fit else 1)
    if explain:
        from peftplan.planning.explain import explain as explained

        click.echo("\n".join(map(explained, results)))
    else:
        render.estimates(results, fmt=fmt, verbose=verbose, explain_peak=explain_peak)
    return code


def _by_number(gpu: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The cards in groups, each with one number of GPUs: one estimate per group."""
    from peftplan.planning.verdicts import counted_cards

    groups = counted_cards(gpu)
    if len(groups) < 2:
        return [gpu]
    return [tuple(name if count is None else f"{count}x{name}" for name in names) for count, names in groups]
