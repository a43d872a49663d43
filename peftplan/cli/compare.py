"""`peftplan compare MODEL`."""

from __future__ import annotations

import click

from peftplan.cli import options, texts
from peftplan.cli.command import METHOD_HEADING, Command, argument, option

GPUS_HEADING = "Several GPUs"
METHOD = {name: text for name, text in texts.METHOD.items() if name != "--method"} | {
    "--peft-config": "a peft adapter_config.json: its rows come first, and methods of its type take its fields"
}


@click.command("compare", cls=Command)
@argument("model", required=False)
@option(
    "--method", "methods", default="lora,dora,qlora,full", metavar="NAMES", show_default=True, help="methods, comma-separated"
)
@option("--gpu", "gpu", multiple=True, metavar="NAME", help="cards, comma-separated or repeated; sizes such as 24GiB; or 8xh100")
@option("--plot", default=None, metavar="FILE", help="bars of every method as FILE.png or .svg, with the cards as lines")
@options.engine_option
@options.group(METHOD_HEADING, METHOD)
@options.group("Model", texts.MODEL)
@options.group("Precision and storage", texts.STORAGE)
@options.group("Training", texts.TRAINING)
@options.group("Preferences and RL", texts.PREFERENCES)
@option("--strategy", "strategies", default="", metavar="NAMES", heading=GPUS_HEADING, help="comma-separated; default: ddp")
@options.group(GPUS_HEADING, {name: text for name, text in texts.GPUS.items() if name != "--strategy"})
@options.torch_option
@options.transformers_option
@options.context_option
@options.format_option
def command(
    model: str | None,
    methods: str,
    strategies: str,
    gpu: tuple[str, ...],
    plot: str | None,
    engine: str,
    fmt: str,
    torch: str | None,
    transformers: str | None,
    context: str | None,
    **fields: object,
) -> int:
    """What a job needs with several methods, on several cards. Without MODEL, --peft-config names its base model.

    \b
    peftplan compare llama-3.1-8b --method lora,dora,qlora,full --gpu l4,a10g,a100-80gb
    peftplan compare qwen3-8b --method lora,ia3 --r 16 --plot methods.png
    peftplan compare qwen3-8b --method full,lora --strategy ddp,fsdp2,zero3 --gpu 2xrtx-4090,4xrtx-4090,8xrtx-4090
    """
    options.check_format(fmt)
    options.check_model(model, fields)
    from peftplan.planning.compare import compare
    from peftplan.report import render

    if plot is not None:
        from peftplan.report.comparing_plot import check

        check(plot)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    chosen = options.chosen(fields) | options.circumstances(torch, transformers, context)
    with options.computed_by(engine) as by_engine:
        result = compare(model, methods=names, gpu=gpu, strategies=strategies, **by_engine, **chosen)
    if plot is not None:
        from peftplan.report.comparing_plot import write

        write(result, plot)
    render.comparison(result, fmt=fmt)
    return 0
