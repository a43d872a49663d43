"""`peftplan sweep MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from peftplan.cli import options, texts
from peftplan.cli.command import METHOD_HEADING, Command, argument, option
from peftplan.errors import BoundError, RefusedError

if TYPE_CHECKING:
    from peftplan.job.grid_options import GridOptions
    from peftplan.planning.sweep_points import Chunk

ALL = "all"


@click.command("sweep", cls=Command)
@argument("model", required=False)
@option("--gpu", "gpu", multiple=True, metavar="NAME", help="cards, comma-separated or repeated; sizes such as 24GiB; or 8xh100")
@option("--output", default=None, metavar="FILE", help="FILE.csv, .jsonl or .parquet; default: stdout")
@option("--format", "fmt", default=None, metavar="[csv|jsonl|parquet]", help="default: from the suffix of --output, else csv")
@option("--replays", default="2000", metavar="INT|all", show_default=True, help="points near a card's limit that are replayed")
@option(
    "--plot", default=None, metavar="FILE", help="map of batch × sequence as FILE.png or .svg, with the cards' limits as lines"
)
@option("--engine", default="analytic", metavar="[analytic]", rare=True, help="a sweep evaluates formulas; traces take too long")
@option("--yes", is_flag=True, help="run a grid of more than 10,000,000 rows")
@options.group(METHOD_HEADING, texts.METHOD, several=True)
@options.group("Model", texts.MODEL, several=True)
@options.group("Precision and storage", texts.STORAGE, several=True)
@options.group("Training", texts.TRAINING, several=True)
@options.group("Preferences and RL", texts.PREFERENCES, several=True)
@options.group("Several GPUs", texts.GPUS, several=True)
@options.torch_option
@options.transformers_option
@options.context_option
def command(
    model: str | None,
    gpu: tuple[str, ...],
    output: str | None,
    fmt: str | None,
    replays: str,
    plot: str | None,
    engine: str,
    yes: bool,
    torch: str | None,
    transformers: str | None,
    context: str | None,
    **fields: tuple[object, ...],
) -> int:
    """A job at every point of a grid: a row for each point and card.

    Every option takes several values (1,2,4) or a range (512:8192:512, the end included), and can be repeated; MODEL takes
    several names. `--padding --no-padding` tries both. Repeat an option whose values contain commas.

    \b
    peftplan sweep llama-3.1-8b --batch-size 1,2,4 --seq-len 512:8192:512 --r 8,16,64 --gpu rtx-4090
    peftplan sweep qwen3-0.6b,qwen3-4b --method lora,qlora --gpu l4,a10g --format jsonl
    peftplan sweep llama-3.1-8b --gpus 2,4,8 --strategy ddp,fsdp2,zero2 --batch-size 1:16 --gpu a100-40gb

    A verdict needs a replay of torch's allocator only if the bytes of the tensors do not decide it. `decided_by` says what did:
    requested (the tensors alone are too large), bound (they are so small that the allocator's overhead does not matter), or
    replay. If there are more points near a limit than --replays, the others have no verdict.
    """
    from peftplan.planning.sweep import MOST_ROWS, sweep
    from peftplan.report import sweeping
    from peftplan.report.progress import waiting

    fmt = sweeping.format_of(fmt, output)
    options.check_model(model, {"peft_config": fields["peft_config"] or None})
    gpus, number = options.counted(gpu, {"gpus": fields["gpus"] or None})
    keywords = {**options.several(fields), **number, **options.circumstances(torch, transformers, context)}
    draw = None
    if plot is not None:
        from peftplan.report.sweeping_plot import Map, check

        check(plot)
        draw = Map(plot)
    with waiting("sweeping") as progress:
        try:
            result = sweep(
                model,
                gpu=gpus,
                replays=_replays(replays),
                engine=engine,
                most_rows=None if yes else MOST_ROWS,
                progress=None if progress is None else lambda what, share: progress(what, share),
                **cast("GridOptions", keywords),
            )
        except RefusedError as error:
            raise RefusedError(f"{error}; add --yes to run it") if str(error).startswith("the grid has") else error from None
        if draw is not None:
            draw.expect(result)

        def each(chunk: Chunk) -> None:
            if draw is not None:
                draw.add(chunk)

        sweeping.write(result, fmt=fmt, output=output, each=each)
    if draw is not None:
        draw.write()
    for warning in result.warnings:
        click.echo(f"peftplan: {warning}", err=True)
    assert result.tally is not None
    click.echo(f"peftplan: {sweeping.summary(result.tally)}", err=True)
    return 0


def _replays(text: str) -> int | None:
    if text == ALL:
        return None
    if not text.isdecimal():
        raise BoundError("--replays", text, "a whole number, or all")
    return int(text)
