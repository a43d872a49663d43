"""`peftplan inspect MODEL`."""

from __future__ import annotations

from typing import Any

import click

from peftplan.cli import options


@click.command("inspect")
@click.argument("model")
@click.option(
    "--match", "pattern", default=None, metavar="TARGETS", help="mark what these target_modules would match (LoRA's rules)"
)
@click.option("--all", "expand", is_flag=True, help="every module by its full name instead of one row per family")
@click.option("--dtype", default="bf16", metavar="VALUE", show_default=True, help="dtype of the weights")
@click.option("--task-type", default=None, metavar="VALUE", help="peft's task type: CAUSAL_LM, SEQ_CLS, …")
@click.option("--num-labels", default=None, type=int, help="classes of a classification head")
@options.format_option
def command(model: str, pattern: str | None, expand: bool, dtype: str, fmt: str, **task: Any) -> int:
    """The module tree of MODEL: shapes, parameters, bytes, and which modules a pattern matches.

    \b
    peftplan inspect mixtral-8x7b --match all-linear
    peftplan inspect ./config.json --match '.*layers\\.(0|1)\\..*proj' --all
    """
    options.check_format(fmt)
    from peftplan.planning.inspection import inspect
    from peftplan.report import render

    render.inspection(inspect(model, pattern=pattern, expand=expand, dtype=dtype, **task), fmt=fmt)
    return 0
