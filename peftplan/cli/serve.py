"""`peftplan serve MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, get_args

import click

from peftplan.cli import options, texts
from peftplan.cli.command import METHOD_HEADING, Command, argument, option, will_exit
from peftplan.errors import RefusedError
from peftplan.job.trainer_words import TrainerName

if TYPE_CHECKING:
    from peftplan.job.options import Options

SERVING: dict[str, str] = {
    "--adapters": "adapters served beside one base; default: 1",
    "--batch-size": "sequences in the KV cache; default: 1",
    "--context": "tokens per sequence in the cache; default: 2048, or the model's maximum",
    "--encoder-context": "positions that cross-attention reads; default: as --context",
    "--serving-dtype": "dtype of the adapters in service; default: that of the base",
}
STORAGE = {
    name: text
    for name, text in texts.STORAGE.items()
    if name not in ("--autocast", "--device-map", "--kbit-prepare/--no-kbit-prepare", "--compute-dtype")
} | {"--trainer": f"{texts.by_tool(get_args(TrainerName))}; decides the dtype of the saved adapter"}


@click.command("serve", cls=Command)
@argument("model", required=False)
@options.group(METHOD_HEADING, texts.METHOD)
@options.group("Model", texts.MODEL)
@options.group("Precision and storage", STORAGE)
@options.group("Serving", SERVING)
@option("--gpu", "gpus", multiple=True, metavar="NAME", help="a card or a size such as 24GiB; repeatable")
@option("--require-fit", is_flag=True, help="exit 1 unless it fits every --gpu")
@option("--allow-tight", is_flag=True, help="let --require-fit accept tight too")
@option("--merge", is_flag=True, help="exit 2 if the method cannot be merged")
@options.format_option
def command(
    model: str | None, fmt: str, merge: bool, gpus: tuple[str, ...], require_fit: bool, allow_tight: bool, **raw: object
) -> int:
    """What MODEL needs after fine-tuning: adapter file, merge, merged model, and serving with a KV cache.

    Each --gpu gets a verdict on base, adapters, KV cache, a step of decoding and CUDA context, and the largest number of
    adapters, tokens of context and sequences that fit it. `fits` leaves at least 5 % of the card. The prompt's activations are
    not counted.

    \b
    peftplan serve llama-2-7b --method lora --r 16 --adapters 8 --batch-size 16 --gpu rtx-4090
    peftplan serve ./config.json --method qlora --merge --format json
    """
    options.check_format(fmt)
    options.check_model(model, raw)
    from peftplan.planning.serving import serving
    from peftplan.report import render

    if require_fit and not gpus:
        raise RefusedError("--require-fit needs a card (--gpu)")
    if allow_tight and not require_fit:
        raise RefusedError("--allow-tight needs --require-fit")
    result = serving(model, merge=merge, gpu=gpus, **cast("Options", options.chosen(raw)))
    accepted = ("fits", "tight") if allow_tight else ("fits",)
    code = will_exit(0 if not require_fit or all(card.verdict in accepted for card in result.gpus) else 1)
    render.serving(result, fmt=fmt)
    return code
