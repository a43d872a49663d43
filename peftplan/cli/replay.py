"""`peftplan replay FILE`."""

from __future__ import annotations

import click

from peftplan.cli import options
from peftplan.cli.command import INT, Command, argument, option, will_exit
from peftplan.errors import InputError, RefusedError


@click.command("replay", cls=Command)
@argument("file")
@option("--capacity", default=None, metavar="SIZE", help="memory limit: a size such as 24GiB, or a card")
@option("--alloc-conf", default=None, metavar="OPTIONS", help="as in PYTORCH_ALLOC_CONF: expandable_segments:True,…")
@options.torch_option
@option("--device", default=0, metavar="INT", type=INT, show_default=True, help="which device of a snapshot")
@option("--device-memory", default=None, metavar="SIZE", help="total memory of the device, for per_process_memory_fraction")
@option("--require-fit", is_flag=True, help="exit 1 if memory runs out")
@options.format_option
def command(
    file: str,
    capacity: str | None,
    alloc_conf: str | None,
    torch: str | None,
    device: int,
    device_memory: str | None,
    require_fit: bool,
    fmt: str,
) -> int:
    """Replay a recorded run through a model of torch's CUDA caching allocator.

    FILE is an event log (`peftplan estimate … --engine trace --timeline FILE.json`) or what
    torch.cuda.memory._dump_snapshot() wrote. Nothing in it is executed.

    \b
    peftplan replay log.json --capacity 24GiB
    peftplan replay snapshot.pickle --alloc-conf expandable_segments:True
    """
    options.check_format(fmt)
    if require_fit and capacity is None and device_memory is None:
        raise RefusedError("--require-fit needs a --capacity")
    from peftplan.planning.replayed import replay_file
    from peftplan.report import render

    replayed = replay_file(
        file,
        capacity_bytes=_bytes("capacity", capacity),
        alloc_conf=alloc_conf,
        torch=torch,
        device=device,
        device_bytes=_bytes("device_memory", device_memory),
    )
    code = will_exit(1 if require_fit and replayed.result.oom is not None else 0)
    render.replayed(replayed, fmt=fmt)
    return code


def _bytes(field: str, size: str | None) -> int | None:
    """What a program can get of a card, or the capacity itself. An error names the field."""
    if size is None:
        return None
    from peftplan.hardware.gpus import find_gpu
    from peftplan.hardware.usable import usable_bytes

    try:
        return usable_bytes(find_gpu(size)).bytes
    except InputError as error:
        raise error.named(field) from None
