"""The cards of a request, and whether a job fits each; the catalogue is read only where a card is named."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from peftplan.distributed.names import MOST_RANKS
from peftplan.errors import InputError, NoEngineError
from peftplan.job.kernels import kernels_of
from peftplan.job.requirements import keeps_one_side, pair
from peftplan.job.setup import Setup
from peftplan.results.peaks import Peaks
from peftplan.results.verdict import TIGHT, Verdict
from peftplan.storage import QuantConfig
from peftplan.storage.config import FORMATS
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu
    from peftplan.hardware.processors import Processors
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job


MAX_CONTEXT_MIB = 2**20
"""No context comes near one TiB: a larger value is a typing error."""
OF_DOCUMENTS = (9, 0)
"""The compute capability from which cuDNN's attention takes packed documents."""


class Vllm(NamedTuple):
    """vLLM on the training GPU: the part of the card that it takes, beside torch's allocator of the trainer.

    `sleeps`: it gives that back while the policy trains (trl `VLLMGeneration`, `sleep(level=2)`), and then what lasts of the
    trainer is beside it, whose cache was emptied. Left out: the context and graphs that a sleeping engine keeps. `shared`: bytes
    of its share that are the trainer's own, as Unsloth trains on vLLM's weights (unsloth_zoo `vllm_utils.py`). `awake`: bytes of
    its weights, which it holds while it gets those of the trainer, where that gathers all of them (ms-swift, `_fast_infer`).
    """

    share: float
    sleeps: bool
    shared: int = 0
    awake: int = 0

    def taken(self, usable: int) -> int:
        """Bytes of a card that it takes while it generates, beside those of the trainer."""
        return max(int(self.share * usable) - self.shared, 0)


def vllm_of(setup: Setup, weights: int = 0) -> Vllm | None:
    """vLLM as a job with so many bytes of base weights runs it on the training GPU; None where it does not."""
    if not setup.vllm_share:
        return None
    shared, awake = setup.packs_completions, setup.by.sends_at_once
    return Vllm(setup.vllm_share, bool(setup.vllm_enable_sleep_mode), weights * shared, weights * awake)


def capability(card: "Gpu | None") -> str:
    """The CUDA compute capability of a card, whose kernels an engine takes; a default where it has none."""
    from peftplan.hardware.context import DEFAULT_CAPABILITY

    own = card.compute_capability if card else None
    return own if own and own[0].isdigit() else ".".join(map(str, DEFAULT_CAPABILITY))


def kernels_on(card: "Gpu | None") -> tuple[str, "Processors"]:
    """What tells cards apart for a job: by it kernels are chosen, and size their buffers."""
    from peftplan.hardware.processors import processors

    of = capability(card)
    return of, processors(of, card.multiprocessors if card else None)


def by_kernels(cards: "Iterable[Gpu]") -> "list[list[Gpu]]":
    """Cards in groups that run the same kernels, that of the first card first; one empty group where no card is named."""
    groups: dict[object, list[Gpu]] = {}
    for card in cards:
        groups.setdefault(kernels_on(card), []).append(card)
    return list(groups.values()) or [[]]


def placed_on(inventory: "Inventory", card: "Gpu | None") -> "Inventory":
    """A job with its tensors on a card, by whose multiprocessors kernels are chosen and size their buffers. Where the card has no
    bf16, Unsloth takes fp16 (unsloth 2026.10.9, models/llama.py, `FastLlamaModel.from_pretrained`).

    Raises NoEngineError where Unsloth dequantizes weights in FP8 in forward too (unsloth 2026.10.9, kernels/fp8.py:1845), and
    where layers in FP8 keep other copies than on Hopper.
    """
    if card is not None and _takes_fp16(card, inventory.job.setup):
        from peftplan.job.inventory import inventory as inventory_of
        from peftplan.job.prepare import prepared

        dtypes = dict.fromkeys(_in_bf16(inventory.job.setup), "fp16")
        inventory = inventory_of(prepared(inventory.job.request.changed(**dtypes)))
    job = inventory.job.on_card(card.multiprocessors if card else None)
    if job.setup.by_unsloth and card is not None and card.compute_capability is not None and _dequantized(card, job.quant):
        raise NoEngineError(f"weights in FP8 on {card.id}, where Unsloth dequantizes them in forward too (no formula yet)")
    if card is not None and keeps_one_side(inventory.job.setup, capability(card)):
        raise NoEngineError(f"layers in FP8 on {card.id}, which keep other copies than on Hopper (no formula yet)")
    return inventory if job is inventory.job else inventory._replace(job=job)


def _in_bf16(setup: Setup) -> list[str]:
    """The options that say bf16."""
    return [name for name in ("dtype", "autocast", "compute_dtype") if getattr(setup, name) == "bf16"]


def _takes_fp16(card: "Gpu", setup: Setup) -> bool:
    """Whether Unsloth takes fp16 in place of bf16."""
    return setup.by_unsloth and card.bf16 is False and setup.dtype == "bf16"


_COUNTED = re.compile(r"\s*([0-9]+)\s*[x×]\s*(?=\S)", re.IGNORECASE)
"""How many of a card: the `8x` of `8xh100-80gb`."""
_MISCOUNTED = re.compile(r"\s*[-+]?[0-9.]+\s*[x×]", re.IGNORECASE)
OF_A_CARD = f"accepted: 1 to {MOST_RANKS:,} of a card, such as 8xh100-80gb"


def counted_cards(gpu: str | Iterable[str] | None) -> list[tuple[int | None, tuple[str, ...]]]:
    """The cards of a request by how many of each there are: `8xh100-80gb,8xl40s,t4` is (8, both) and (None, t4).

    Raises InputError for a number that no run has.
    """
    if gpu is None or not isinstance(gpu, Iterable):
        return []
    by_count: dict[int | None, list[str]] = {}
    for name in (gpu,) if isinstance(gpu, str) else gpu:
        for one in name.split(",") if isinstance(name, str) else (name,):
            counted = _COUNTED.match(one) if isinstance(one, str) else None
            if counted is None and isinstance(one, str) and _MISCOUNTED.match(one):
                raise InputError("gpu", one, OF_A_CARD)
            by_count.setdefault(_number(counted) if counted else None, []).append(one[counted.end() :] if counted else one)
    return [(count, tuple(names)) for count, names in by_count.items()]


def _number(counted: re.Match[str]) -> int:
    """How many of a card there are. Raises InputError."""
    digits = counted[1].lstrip("0") or "0"
    if len(digits) > len(str(MOST_RANKS)) or not 1 <= int(digits) <= MOST_RANKS:
        raise InputError("gpu", counted.string, OF_A_CARD)
    return int(digits)


def find_cards(gpu: str | Iterable[str] | None, *, context: object = None) -> "list[Gpu]":
    """The cards named by `gpu`, each once, in the order of their first names: one name, several, or none.

    `context`: MiB of CUDA context to count on each; None leaves it to what is known. Raises InputError or UnknownNameError.
    """
    names = (gpu,) if isinstance(gpu, str) else () if gpu is None else tuple(gpu) if isinstance(gpu, Iterable) else (gpu,)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise InputError("gpu", wrong[0], "accepted: names of cards (`peftplan gpus`), or sizes such as 24GiB")
    context_mib = None if context is None else parse_context(context)
    if not names:
        return []
    from peftplan.hardware.gpus import find_gpu

    several = next((name for each in names for name in each.split(",") if _COUNTED.match(name)), None)
    if several is not None:
        raise InputError("gpu", several, "it counts GPUs where one is meant; accepted: the name of a card alone")
    cards: dict[object, Gpu] = {}
    for card in (find_gpu(name) for each in names for name in each.split(",")):
        cards.setdefault(card._replace(id="", name="") if card.vendor is None else card.id, card)  # 24GB is 24G
    return [card._replace(context_mib=context_mib) for card in cards.values()]


def parse_context(context: object) -> float:
    """A CUDA context in MiB, from a number or its text. Raises InputError."""
    try:
        mib = float(context) if isinstance(context, (int, float, str)) and not isinstance(context, bool) else -1.0
    except (ValueError, OverflowError):
        mib = -1.0
    if not 0 <= mib <= MAX_CONTEXT_MIB:
        raise InputError("context", context, f"accepted: MiB of CUDA context, from 0 to {MAX_CONTEXT_MIB:,}")
    return mib


def card_notes(cards: "Iterable[Gpu]", job: "Job") -> list[str]:
    """What a card does otherwise than the setup says, which no number shows.

    torch emulates bf16 below compute capability 8.0; transformers dequantizes a format that the card is too old for.
    """
    return [f"{card.id}: {note}" for card in dict.fromkeys(cards) for note in _notes(card, job)]


def _dequantized(card: "Gpu", quant: QuantConfig | None) -> tuple[int, int] | None:
    """The compute capability that a format needs; None where the card has it."""
    oldest = FORMATS[quant.name].compute_capability if quant else None
    return oldest if oldest is not None and pair(capability(card)) < oldest else None


def _in_fp16(job: "Job") -> str:
    """The options of the same job in fp16, whose gradients are unscaled in fp32; nothing where what trains is in 16 bits then."""
    setup, adaptation = job.setup, job.adaptation
    weights_train = bool(adaptation.trained) or any(tensor.trainable and tensor.dtype == "base" for tensor in adaptation.added)
    if not weights_train and setup.adapter_dtype != "fp32":
        return ""
    also = " --compute-dtype fp16" if setup.compute_dtype == "bf16" else ""
    return f" (--dtype {'fp32' if weights_train else 'fp16'} --autocast fp16{also})"


def _notes(card: "Gpu", job: "Job") -> Iterator[str]:
    has, setup, quant = capability(card), job.setup, job.quant
    if (vllm := vllm_of(setup)) is not None:
        from peftplan.hardware.usable import usable_bytes

        when = "while it generates, and sleeps while the policy trains" if vllm.sleeps else "beside the trainer"
        taken = format_bytes(vllm.taken(usable_bytes(card).bytes))
        weights = ", the weights that it trains on included" if setup.packs_completions else ""
        yield f"vLLM takes {taken} {when}{weights} (--vllm-gpu-memory-utilization {vllm.share})"
    if card.sold_gb is not None:
        from peftplan.hardware.usable import usable_bytes

        yield usable_bytes(card).why
    if card.compute_capability is not None and card.compute_capability != has:
        yield f"counted with the kernels of CUDA's compute capability {has}"
    if _takes_fp16(card, setup):
        yield "no bf16 in hardware: Unsloth takes fp16 there, which is counted"
    elif card.bf16 is False and _in_bf16(setup):
        yield f"no bf16 in hardware: torch emulates it, slowly{_in_fp16(job)}"
    if quant and (oldest := _dequantized(card, quant)) and not setup.by_unsloth:
        yield f"{quant.name} needs compute capability {oldest[0]}.{oldest[1]}: transformers loads the larger, dequantized model"
    if kernels_of(setup.kernels or ()).attention is not None and pair(has) < OF_DOCUMENTS:
        yield (
            f"cuDNN's attention takes packed documents from compute capability {OF_DOCUMENTS[0]}.{OF_DOCUMENTS[1]} on "
            "(transformer-engine, common/fused_attn/fused_attn.cpp): here another one runs, which is not counted"
        )


def verdict(
    card: "Gpu",
    static_bytes: int,
    peaks: Peaks | None,
    runs_within: Callable[[int], bool] | None = None,
    *,
    refused: str | None = None,
    skip_unfit: bool = False,
    bound: str | None = None,
    vllm: Vllm | None = None,
) -> Verdict:
    """Whether a job fits a card.

    *Needed* are the bytes that the allocator reserves without a limit, however late the GPU is, and the CUDA context, assumed
    where it is not known.
    `fits`: at least 5 % of the usable bytes are left. `tight`: less is left, or less than nothing while the job runs where the
    allocator may take no more than is usable: it releases cached memory before it fails. `does_not_fit`: it fails there.
    `does_not_run`: a library raises, for the reason `refused`. `unknown`: no peak, or a lower bound that is not too large, or an
    upper one that is, or a run that depends on the GPU's pace. Where reserved bytes are not known, a job `fits` with a margin,
    and its allocated bytes are a lower bound elsewhere. `bound`: what the peak is where a file has keys that no option says:
    `at_least`, `at_most` or `unknown`.

    `static_bytes`: what lasts from step to step, a lower bound where there is no peak. `runs_within`: whether the job runs where
    the allocator can take so many bytes. `skip_unfit`: do not replay peaks whose tensors alone are too large. `vllm`: what vLLM
    takes of the card.
    """
    usable, room = usable_and_room(card)
    taken = 0 if vllm is None else vllm.taken(usable)
    beside = 0 if vllm is None or vllm.sleeps else taken
    room -= beside
    unfit = skip_unfit and peaks is not None and peaks.at_least > room
    reserved = static_bytes if peaks is None else peaks.at_least if unfit else peaks.reserved_at_most or peaks.allocated
    lower_bound = peaks is None or bool(peaks.incomplete) or bound == "at_least"
    with_care = None if peaks is None or unfit else peaks.reserved_with_care
    surely = with_care is not None and room - with_care >= TIGHT * usable
    if with_care is not None:
        reserved, lower_bound = (with_care, lower_bound) if surely or bound == "at_most" else (reserved, True)
    if vllm is not None and vllm.sleeps:
        sent = 0 if peaks is None else peaks.by_phase.get("generate", 0)
        generating = max((taken, static_bytes), (vllm.awake, sent), key=sum)
        if sum(generating) > reserved:
            beside, reserved = generating
            room -= beside
    releases_cache = with_care is None and reserved > room and peaks is not None and _ends(peaks, runs_within, room)
    if refused is not None:
        word = "does_not_run"
    elif reserved > room and not releases_cache:
        may = bound in ("at_most", "unknown") or (peaks is not None and peaks.may_run_within(room))
        word = "unknown" if may else "does_not_fit"
    elif lower_bound:
        word = "unknown"
    else:
        word = "fits" if room - reserved >= TIGHT * usable else "tight"
    return stated(
        card,
        word,
        reserved,
        vllm=beside,
        lower_bound=lower_bound,
        upper_bound=(surely or bound == "at_most") and not lower_bound,
        runs_by_releasing_cache=releases_cache and word == "tight",
        scope=None if peaks is None else peaks.scope,
        reason=refused,
    )


def usable_and_room(card: "Gpu") -> tuple[int, int]:
    """Bytes of a card that a program can use, and what the CUDA context leaves of them to the allocator."""
    from peftplan.hardware.context import context_for_verdict
    from peftplan.hardware.usable import usable_bytes

    usable = usable_bytes(card).bytes
    return usable, usable - context_for_verdict(card).bytes


def stated(
    card: "Gpu",
    word: str,
    reserved: int,
    *,
    vllm: int = 0,
    lower_bound: bool = False,
    upper_bound: bool = False,
    runs_by_releasing_cache: bool = False,
    scope: str | None = None,
    reason: str | None = None,
) -> Verdict:
    """A verdict in this word on a job whose allocator reserves so many bytes, with the card's usable bytes and context."""
    from peftplan.hardware.context import context_for_verdict
    from peftplan.hardware.usable import usable_bytes

    usable, context = usable_bytes(card), context_for_verdict(card)
    return Verdict(
        card.id,
        usable.bytes,
        usable.why,
        word,
        needed_bytes=reserved + vllm + context.bytes,
        vllm_bytes=vllm,
        context_bytes=context.bytes,
        context_source=context.why,
        context_assumed=context.assumed,
        lower_bound=lower_bound,
        upper_bound=upper_bound,
        runs_by_releasing_cache=runs_by_releasing_cache,
        scope=scope,
        reason=reason,
    )


def _ends(peaks: Peaks, runs_within: Callable[[int], bool] | None, room: int) -> bool:
    """Whether a replay ends without error where the allocator may take so many bytes; tensors that alone are more never do."""
    return runs_within is not None and peaks.at_least <= room and runs_within(room)


def all_fit(verdicts: Iterable[Verdict], *, allow_tight: bool = False, text_only: bool = False) -> bool:
    """Whether every card `fits`, or with `allow_tight` is at least `tight`; a verdict for text alone counts with `text_only`."""
    words = ("fits", "tight") if allow_tight else ("fits",)
    return all(verdict.verdict in words and (text_only or verdict.scope is None) for verdict in verdicts)
