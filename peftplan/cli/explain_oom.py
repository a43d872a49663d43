"""`peftplan explain-oom FILE`."""

from __future__ import annotations

import click

from peftplan.cli import options, texts
from peftplan.cli.command import METHOD_HEADING, Command, argument, option


@click.command("explain-oom", cls=Command)
@argument("source", metavar="FILE")
@option(
    "--model",
    default=None,
    metavar="MODEL",
    help="the model that ran; with the job's options, shows what was expected",
)
@options.group(METHOD_HEADING, texts.METHOD)
@options.group("Model", texts.MODEL)
@options.group("Precision and storage", texts.STORAGE)
@options.group("Training", texts.TRAINING)
@options.group("Preferences and RL", texts.PREFERENCES)
@options.format_option
def command(source: str, model: str | None, fmt: str, **fields: object) -> int:
    """Why a program ran out of memory, and what to try next.

    FILE is a log that contains torch's message, or a snapshot that torch.cuda.memory._dump_snapshot() wrote; - is standard input.
    The message itself, in quotes, is accepted too.

    \b
    python train.py 2>&1 | peftplan explain-oom -
    peftplan explain-oom train.log --model llama-3.1-8b --method lora --batch-size 4
    """
    options.check_format(fmt)
    from peftplan.oom.diagnosis import explain_oom
    from peftplan.report import render

    chosen = options.chosen(fields)
    if chosen and model is None:
        from peftplan.errors import RefusedError

        raise RefusedError(f"--{next(iter(chosen)).replace('_', '-')} describes a job: add --model MODEL")
    render.oom(explain_oom(source, model=model, options=chosen), fmt=fmt)
    return 0
