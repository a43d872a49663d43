"""Options that a library refuses to run on some cards: one row each, with the line that raises; batch sizes that a trainer
refuses on any, and dtypes that flash-attn refuses.

Options that are only slower or different there have no row: torch emulates bf16, transformers dequantizes fp8 and mxfp4
(`planning.verdicts.card_notes` says so), and bitsandbytes multiplies int8 slowly. AMD's cards and plain sizes are not checked:
the rows compare CUDA's compute capability, and flash-attn has other kernels for AMD.
"""

from math import gcd
from typing import NamedTuple

from peftplan.errors import RefusedError
from peftplan.job.kernels import FLOAT8
from peftplan.job.setup import Setup
from peftplan.versions import named


class Requirement(NamedTuple):
    """Values of an option that need a compute capability; `raises` is the function that refuses older cards, with its file."""

    option: str
    values: tuple[str, ...]
    compute_capability: tuple[int, int]
    raises: str
    instead: str
    before: tuple[int, int] | None = None
    """The compute capability from which on newer cards are refused too."""


IN_8_BITS = "transformer-engine 2.20.2, pytorch/quantization.py"
BY_EXPERTS = "te-experts in --kernels"
REQUIREMENTS = (
    Requirement(
        "attn_implementation",
        ("flash_attention_2",),
        (8, 0),
        "flash-attn 2.8.3, mha_fwd and mha_varlen_fwd in csrc/flash_attn/flash_api.cpp: "
        '"FlashAttention only supports Ampere GPUs or newer."',
        "--attn-implementation sdpa",
    ),
    Requirement(
        "optim",
        ("adamw_torch_4bit", "adamw_torch_8bit"),
        (7, 0),
        f"{named('torch')}, GPUTooOldForTriton in create_backend of torch/_inductor/scheduler.py; "
        f"{named('torchao')} compiles its step",
        "--optim adamw_8bit",
    ),
    Requirement(
        "kernels",
        FLOAT8,
        (8, 9),
        'nemo_automodel, components/quantization/fp8.py (`apply_fp8_to_model`): "FP8 is only supported on SM89 or later GPUs"',
        "--kernels none",
    ),
    Requirement("kernels", ("te-fp8.experts",), (8, 9), f"{IN_8_BITS}, `check_fp8_support`", BY_EXPERTS),
    Requirement("kernels", ("te-fp8-blocks.experts",), (9, 0), f"{IN_8_BITS}, `check_fp8_block_scaling_support`", BY_EXPERTS),
    Requirement("kernels", ("te-mxfp8.experts",), (10, 0), f"{IN_8_BITS}, `check_mxfp8_support`", BY_EXPERTS, before=(12, 0)),
)


def unmet(setup: Setup, of_card: str | None) -> str | None:
    """Why a job does not run on a card with this compute capability, and what runs instead; None if nothing refuses it, or the
    card has none that CUDA knows."""
    if of_card is None or not of_card[0].isdigit():
        return None
    compute_capability = pair(of_card)
    for needs in REQUIREMENTS:
        stated = getattr(setup, needs.option)
        value = next((each for each in (stated if isinstance(stated, tuple) else (stated,)) if each in needs.values), None)
        if value is None:
            continue
        if compute_capability < needs.compute_capability or (needs.before is not None and compute_capability >= needs.before):
            limits = [needs.compute_capability, *((needs.before,) if needs.before is not None else ())]
            accepted = " and below ".join(dotted(limit) for limit in limits)
            return f"{value} needs compute capability {accepted}, the card has {of_card} ({needs.raises}); use {needs.instead}"
    return None


BLACKWELL = (10, 0)
ON_HOPPER = ("te-fp8.experts", "te-fp8-blocks.experts")


def keeps_one_side(setup: Setup, of_card: str) -> bool:
    """Whether layers in 8 bits keep other copies on a card than on Hopper: from Blackwell on, products in FP8 read either side of
    a tensor (transformer-engine 2.20.2, pytorch/tensor/float8_tensor.py:423), and blocks are scaled as in MXFP8
    (pytorch/module/grouped_linear.py:103)."""
    return pair(of_card) >= BLACKWELL and any(name in ON_HOPPER for name in setup.kernels or ())


def dotted(compute_capability: tuple[int, int]) -> str:
    """A compute capability as CUDA writes it."""
    return ".".join(map(str, compute_capability))


def accepted_batch(setup: Setup, replicas: int) -> int:
    """The batch size, or the next larger one, that the trainer accepts, on so many ranks with batches of their own.

    KTO's KL term compares completions with others of the same batch (trl, kto_trainer.py: "batch size must be > 1"). GRPO and
    RLOO generate all completions of a prompt together (grpo_config.py: "generation_batch_size must be divisible by
    num_generations").
    """
    size = setup.batch_size
    if any(forward.batch for forward in setup.forwards) and not setup.by.others_in_data:
        return max(size, 2)
    together = setup.num_generations or setup.by.num_generations or 1
    unit = together // gcd(together, setup.generation_rows // size * replicas)
    return -(-size // unit) * unit


def refused_batch(setup: Setup, replicas: int) -> str | None:
    """Why the trainer raises at this batch size, and which it accepts; None where it runs."""
    larger = accepted_batch(setup, replicas)
    if larger == setup.batch_size:
        return None
    if setup.by.num_generations is None:
        return f"{setup.by.called} refuses a batch of one; use --batch-size {larger} or --loss-type apo_zero_unpaired"
    together, rows = setup.num_generations or setup.by.num_generations, setup.generation_rows * replicas
    completions = f"{rows} completion{'s' * (rows > 1)}"
    return (
        f"{setup.by.called} generates {completions} at once, which is not a multiple of num_generations {together}; "
        f"use --batch-size {larger} or another --num-generations"
    )


def rows_apart(setup: Setup) -> str | None:
    """What stands for a batch of several rows where the trainer joins them into one, whose mask is tokens x tokens; None where
    rows stay rows, or one is all there is (trl, trainer/sft_trainer.py, `DataCollatorForLanguageModeling`)."""
    if not setup.by.packs or setup.batch_size == 1:
        return None
    rows, tokens = setup.batch_size, setup.seq_len
    joined = f"{setup.by.called} joins {rows} rows of {tokens} tokens into one"
    return f"{joined}; use --batch-size 1 --seq-len {rows * tokens}"


def pair(compute_capability: str) -> tuple[int, int]:
    """(major, minor) of a compute capability such as `8.9`."""
    major, _, minor = compute_capability.partition(".")
    return int(major), int(minor or 0)


def check_flash_dtypes(query: str, key: str, value: str) -> None:
    """What flash-attn checks of its inputs (flash_api.cpp, `mha_fwd`). Raises RefusedError, as it raises RuntimeError."""
    for name, dtype in (("key", key), ("value", value)):
        if dtype != query:
            raise RefusedError(
                f"attn_implementation: flash_attention_2 raises 'query and {name} must have the same dtype' "
                f"(here {query} and {dtype}); accepted: eager, sdpa, or an adapter on the query too"
            )


AT_ONCE = 64
"""Rows of PPO's `local_rollout_forward_batch_size`, by default."""


def rows_at_once(setup: Setup) -> int:
    """Completions that PPO writes and scores at once."""
    return min(setup.generation_rows, setup.rollout_batch_size or AT_ONCE)


def writes_in_unequal_parts(setup: Setup) -> bool:
    """Whether the last of these parts has fewer completions, and so is padded with all of its logits."""
    return setup.by.values and setup.generation_rows % rows_at_once(setup) > 0
