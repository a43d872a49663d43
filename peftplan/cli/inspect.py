"""`peftplan inspect MODEL`."""

from __future__ import annotations

import click

from peftplan.cli import options
from peftplan.cli.command import INT, Command, argument, option


@click.command("inspect", cls=Command)
@argument("model")
@option(
    "--match",
    "pattern",
    default=None,
    metavar="TARGETS",
    help="mark the modules that these target_modules match, by LoRA's rules",
)
@option("--all", "expand", is_flag=True, help="list every module by its full name instead of one row per family")
@option("--dtype", default="bf16", metavar="[bf16|fp16|fp32]", show_default=True, help="dtype of the weights")
@option("--task-type", default=None, metavar="NAME", help="peft's task type: CAUSAL_LM, SEQ_CLS, …")
@option("--num-labels", default=None, type=INT, metavar="INT", help="classes of a classification head")
@options.format_option
def command(
    model: str, pattern: str | None, expand: bool, dtype: str, fmt: str, task_type: str | None, num_labels: int | None
) -> int:
    """The module tree of MODEL: shapes, parameters, bytes, and which modules a pattern matches.

    \b
    peftplan inspect mixtral-8x7b --match all-linear
    peftplan inspect ./config.json --match '.*layers\\.(0|1)\\..*proj' --all
    """
    options.check_format(fmt)
    from peftplan.planning.inspection import inspect
    from peftplan.report import render

    result = inspect(model, pattern=pattern, expand=expand, dtype=dtype, task_type=task_type, num_labels=num_labels)
    render.inspection(result, fmt=fmt)
    return 0
