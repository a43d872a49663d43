"""`peftplan serve MODEL`."""

from __future__ import annotations

from typing import Any

import click

from peftplan.cli import options
from peftplan.cli.command import METHOD_HEADING, Command, argument, option

SERVING: dict[str, str] = {
    "--adapters": "adapters served beside one base; default: 1",
    "--batch-size": "sequences in the KV cache; default: 1",
    "--context": "tokens of each sequence in the cache; default: 2048, or as many as the model holds",
    "--encoder-context": "positions that cross-attention reads; default: as --context",
    "--serving-dtype": "dtype of the adapters in service; default: that of the base",
}
STORAGE = {
    name: text
    for name, text in options.STORAGE.items()
    if name not in ("--autocast", "--kbit-prepare/--no-kbit-prepare", "--compute-dtype")
} | {"--trainer": "plain | transformers | trl | qlora-paper: decides the dtype of the saved adapter"}


@click.command("serve", cls=Command)
@argument("model", required=False)
@options.group(METHOD_HEADING, options.METHOD)
@options.group("Model", options.MODEL)
@options.group("Precision and storage", STORAGE)
@options.group("Serving", SERVING)
@option("--merge", is_flag=True, help="exit 2 if the method has no merge")
@options.format_option
def command(model: str | None, fmt: str, merge: bool, **raw: Any) -> int:
    """What MODEL needs after fine-tuning: adapter file, merge, merged model, and serving with a KV cache.

    \b
    peftplan serve llama-2-7b --method lora --r 16 --adapters 8 --batch-size 16 --context 4096
    peftplan serve ./config.json --method qlora --merge --format json
    """
    options.check_format(fmt)
    options.check_model(model, raw)
    from peftplan.planning.serving import serving
    from peftplan.report import render

    render.serving(serving(model, merge=merge, **options.chosen(raw)), fmt=fmt)
    return 0
