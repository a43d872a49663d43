"""What DeepSpeed and accelerate refuse of ranks that share rows by Ulysses, each with the line that raises."""

from __future__ import annotations

from peftplan.arch.modules import Architecture
from peftplan.distributed.strategy import Distributed
from peftplan.errors import InputError, RefusedError
from peftplan.job.setup import Setup
from peftplan.versions import ULYSSES_TAKEN, named

WITHOUT_MASK = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Attention that accelerate's `sp_attn_implementation` may name (utils/dataclasses.py, `DeepSpeedSequenceParallelConfig`)."""


def check_ulysses(distributed: Distributed, setup: Setup, architecture: Architecture) -> None:
    """Raise RefusedError or InputError for rows that Ulysses does not divide between ranks."""
    ranks = distributed.sp_size or 1
    if ULYSSES_TAKEN.after(distributed.deepspeed_version):
        raise RefusedError(
            f"sp_size: {named('accelerate')} refuses deepspeed {distributed.deepspeed_version}: ImportError: Deepspeed "
            "ALST/Ulysses requires deepspeed>=0.18.2 (accelerator.py:2404); accepted: a later release"
        )
    if setup.attn_implementation not in (None, *WITHOUT_MASK):
        raise RefusedError(
            f"attn_implementation: {named('accelerate')} refuses {setup.attn_implementation} with sp_size: ValueError: Invalid "
            f"sp_attn_implementation (utils/dataclasses.py:2300); accepted: {', '.join(WITHOUT_MASK)}"
        )
    if any(block.delta_rule is not None for block in architecture.blocks):
        raise RefusedError(
            f"sp_size: {named('accelerate')} refuses {architecture.model_type}: ValueError: Sequence parallelism does not "
            "support attention layers of type ['linear_attention'] (big_modeling.py:760); accepted: 1"
        )
    for attention in (attention for block in architecture.blocks for attention in block.attentions):
        heads, pairs = attention.num_attention_heads, attention.num_key_value_heads
        if heads % ranks:
            why = f"Attention head count {heads} is not divisible by SP size {ranks}"
            raise RefusedError(f"sp_size: {named('deepspeed')} refuses it: ValueError: {why}; accepted: a divisor of {heads}")
        if pairs % ranks and ranks % pairs:
            why = f"KV attention head count {pairs} is not divisible by SP size {ranks} or vice versa"
            raise RefusedError(f"sp_size: {named('deepspeed')} refuses it: ValueError: {why}; accepted: a divisor or a multiple")
    if setup.seq_len % ranks:
        why = f"batch's seqlen={setup.seq_len} isn't divisible by sp-size={ranks} (ulysses_sp.py:707)"
        raise InputError("seq_len", setup.seq_len, f"{named('deepspeed')} refuses it: ValueError: {why}; accepted: a multiple")
