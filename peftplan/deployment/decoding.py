"""The temporaries of one decoding step, beside base, adapters and cache: a layer, then logits and scores.

b sequences, V vocabulary, h hidden_size, i width of the MLP of one token, e bytes of a number in the dtype of the base.

    layer      e · b · (2h + 3i)      residual and norm; gate, up and their product, of every expert that a token goes to
    sampling   (e + 17) · b · V       the head's logits; in fp32 their copy, the scores that top-k leaves, the scores and the
                                      probabilities of the step before; top-k's mask
    between steps, 8 · b · V          scores and probabilities, while the next token goes through the layers

Source: transformers, `generation/utils.py` (`_sample`, whose variables live until they are assigned again) and
`TopKLogitsWarper`, at the defaults of `generate(do_sample=True)`; without sampling a step takes (e + 8) · b · V. Left out: the
prompt, which goes through the layers at once; other filters (top-p takes about 21 bytes more per logit).
"""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.arch.blocks import Mlp
from peftplan.arch.modules import Architecture
from peftplan.deployment.kv_cache import CacheTensor, growing_bytes
from peftplan.dtypes import ITEMSIZE
from peftplan.units import round512

FP32 = 4


def step_bytes(arch: Architecture, cache: Iterable[CacheTensor], *, batch_size: int, dtype: str) -> int:
    """The most that a step holds for a moment: in a layer, while its cache grows by one token, or when it samples."""
    b, e, logits = batch_size, ITEMSIZE[dtype], batch_size * arch.vocab_size
    widest = max((_width(block.mlp) for block in arch.blocks if block.stack == "decoder"), default=0)
    layer = 2 * round512(e * b * arch.hidden_size) + 3 * round512(e * b * widest)
    scores = 2 * round512(FP32 * logits)
    sampling = round512(e * logits) + 2 * round512(FP32 * logits) + round512(logits)
    return scores + max(growing_bytes(cache) + layer, sampling)


def _width(mlp: Mlp) -> int:
    """Numbers of one token between the matrices of the MLP."""
    return mlp.intermediate_size * max(mlp.num_experts_per_tok, 1) + mlp.shared_intermediate_size
