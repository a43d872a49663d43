"""`peftplan export MODEL --to TOOL`."""

from __future__ import annotations

from typing import get_args

import click

from peftplan.cli import options, texts
from peftplan.cli.command import METHOD_HEADING, Command, argument, option
from peftplan.errors import RefusedError
from peftplan.job.configs.plan import ExportTool


@click.command("export", cls=Command)
@argument("model", required=False)
@option("--to", "to", default=None, metavar=f"[{'|'.join(get_args(ExportTool))}]", help="the tool that will run the job")
@option("-o", "--output", default=None, metavar="FILE", help="write to FILE instead of stdout")
@option("--force", is_flag=True, help="replace FILE if it exists")
@options.group(METHOD_HEADING, texts.METHOD)
@options.group("Model", texts.MODEL)
@option("--config", "config", multiple=True, metavar="FILE", heading="Model", help="a config of another tool to translate")
@option("--tool", default=None, rare=True, metavar="NAME", heading="Model", help="the tool of --config")
@options.group("Precision and storage", texts.STORAGE)
@options.group("Training", texts.TRAINING)
@options.group("Preferences and RL", texts.PREFERENCES)
@options.group("Several GPUs", texts.GPUS)
@options.torch_option
@options.transformers_option
@option("--gpu", "gpu", multiple=True, metavar="NAME", help="a card for the verdict in the comments, or several as 8xh100")
@options.context_option
def command(
    model: str | None,
    to: str | None,
    output: str | None,
    force: bool,
    config: tuple[str, ...],
    tool: str | None,
    torch: str | None,
    transformers: str | None,
    gpu: tuple[str, ...],
    context: str | None,
    **raw: object,
) -> int:
    """Write a job as a config of another training tool, with its estimate in comments.

    Takes the options of `peftplan estimate`. Every option that you set is written to the config; if the tool has no such option,
    export refuses and names it. `peftplan estimate --config FILE` reproduces the numbers. Dataset, output folder and learning
    rate are placeholders.

    \b
    peftplan export llama-3.1-8b --method qlora --gpu rtx-4090 --to axolotl > qlora.yml
    peftplan export qwen3-8b --gpu 8xh100-80gb --strategy fsdp2 --to llamafactory > lora.yml
    """
    from peftplan.planning.export import check_output, check_tool, export

    if to is None:
        raise RefusedError(f"--to is missing: name a tool; accepted: {', '.join(get_args(ExportTool))}")
    check_tool(to)
    if force and output is None:
        raise RefusedError("--force needs a FILE to replace (--output)")
    if output is not None:
        check_output(output, force=force)
    if not config:
        options.check_model(model, raw, also="a --config that names one, or ")
    from peftplan.planning.estimate import estimate

    wanted = options.chosen(raw) | options.circumstances(torch, transformers, context)
    files = {"config": config, "tool": tool} if config else {}
    exported = export(estimate(model, gpu=gpu, **files, **wanted), to=to, file=output)  # type: ignore[arg-type]
    if output is None:
        click.echo(exported.text, nl=False)
    else:
        exported.write(output, force=force)
    for note in exported.notes():
        click.echo(f"note: {note}", err=True)
    return 0
