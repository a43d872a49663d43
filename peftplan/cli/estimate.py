"""`peftplan estimate MODEL`."""

from __future__ import annotations

from typing import Any

import click

from peftplan.cli import options


@click.command("estimate", cls=options.Command)
@click.argument("model")
@options.group("Method", options.METHOD)
@options.group("Model", options.MODEL)
@options.group("Precision and storage", options.STORAGE)
@options.group("Training", options.TRAINING)
@click.option("--engine", default="analytic", metavar="NAME", show_default=True, help="analytic | trace")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="a card or a capacity such as 24GiB; repeatable")
@click.option("--require-fit", is_flag=True, help="exit 1 unless the job is known to fit every --gpu")
@options.format_option
@click.option("-v", "--verbose", is_flag=True, help="every line with its formula and source, and why so much is usable")
def command(model: str, fmt: str, verbose: bool, require_fit: bool, gpus: tuple[str, ...], engine: str, **given: Any) -> int:
    """What fine-tuning MODEL needs.

    MODEL is a built-in name (`peftplan models`), a Hub id, or a path to a config.json or its folder.

    \b
    peftplan estimate llama-2-70b --method qlora --r 16
    peftplan estimate ./config.json --method dora --target-modules q_proj,v_proj --gpu rtx-4090
    """
    options.check_format(fmt)
    from peftplan.planning.estimate import estimate

    result = estimate(model, gpu=gpus, engine=engine, **options.given(given))  # type: ignore[arg-type]
    from peftplan.report import render

    render.estimate(result, fmt=fmt, verbose=verbose)
    return 1 if require_fit and any(verdict.verdict not in ("fits", "tight") for verdict in result.gpus) else 0
