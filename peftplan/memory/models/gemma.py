"""Gemma 1 to 3 (text): norms that multiply by one plus a weight, and a scaled embedding.

Sources: transformers, models/{gemma,gemma2,gemma3}/modeling_*.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory.models.decoder import decoder
from peftplan.memory.models.style import Style
from peftplan.memory.norms import rms_plus_one

SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")

gemma = partial(decoder, style=Style(norm=rms_plus_one))
gemma2 = partial(decoder, style=Style(norm=rms_plus_one, norms=SANDWICH, both_masks=True))
GEMMA3 = Style(
    norm=rms_plus_one,
    norms=SANDWICH,
    qk_norm="moved",
    norms_last=True,
    tables_by_window=True,
    softcaps=False,
    both_masks=True,
)
gemma3 = partial(decoder, style=GEMMA3)
