"""The KV cache as transformers' `DynamicCache` stores it while it decodes: two tensors per layer, of the kind of its attention.

b batch_size, T context (tokens in the cache, virtual ones included), a key/value heads, d head_dim, dv value_head_dim, w window.

    full        keys (b, a, T, d)            values (b, a, T, dv)
    sliding     keys (b, a, min(T, w), d)    values (b, a, min(T, w), dv)
    latent      keys (b, 1, T, rank)         values (b, 1, T, rope)        MLA, shared by all heads
    cross       keys (b, a, S, d)            values (b, a, S, d)           S encoder positions, written once

Source: transformers, `cache_utils.py` (`DynamicLayer`, `DynamicSlidingWindowLayer`, `EncoderDecoderCache`), and each model's
attention; DeepSeek caches before it expands (`modeling_deepseek_v3.py`). Left out: a sliding layer keeps the whole prompt from
the prefill until the next token, and one tensor more of a layer lives while a token is appended (`growing_bytes`).
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from peftplan.arch.blocks import Attention
from peftplan.arch.modules import Architecture, Shape
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import NeedsTraceError, RefusedError
from peftplan.units import round512

STATE = "state"
"""What linear attention and convolutions keep, independent of the context."""
GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Tasks whose models decode token by token."""


class CacheTensor(NamedTuple):
    """The tensor of `layers` layers of one kind, one each."""

    kind: str
    part: str
    dtype: str
    shape: Shape
    layers: int

    @property
    def num_bytes(self) -> int:
        """Device bytes over all layers, each tensor rounded up to 512."""
        return self.layers * round512(ITEMSIZE[self.dtype] * prod(self.shape))


def kv_cache(arch: Architecture, *, batch_size: int, context: int, encoder_context: int, dtype: str) -> tuple[CacheTensor, ...]:
    """The cache of `batch_size` sequences with `context` tokens each; cross-attention reads `encoder_context` positions.

    Raises RefusedError for a model that does not decode, NeedsTraceError for one whose blocks are not known here.
    """
    if arch.task_type not in GENERATES:
        raise RefusedError(f"{arch.model_class} keeps no KV cache: it does not generate")
    blocks = [block for block in arch.blocks if block.stack == "decoder"]
    if not all(block.attentions for block in blocks) or not blocks:
        raise NeedsTraceError(f"the KV cache of model_type {arch.model_type!r} is not modelled")
    layers_of: dict[tuple[str, str, Shape], int] = {}
    for block in blocks:
        for attention in block.attentions:
            if attention.borrows:
                continue
            tokens = encoder_positions(arch) or encoder_context if attention.cross else context
            for kind, part, dims in _tensors(arch, attention, tokens):
                key = (kind, part, (batch_size, *dims))
                layers_of[key] = layers_of.get(key, 0) + len(block.layers)
    return tuple(CacheTensor(kind, part, dtype, shape, layers) for (kind, part, shape), layers in layers_of.items())


def growing_bytes(cache: Iterable[CacheTensor]) -> int:
    """What appending one token needs briefly: a new copy of a layer's keys (and values in a sliding layer) beside the old one."""
    layer: dict[str, list[int]] = {}
    for tensor in cache:
        layer.setdefault(tensor.kind, []).append(tensor.num_bytes // tensor.layers)
    growing = {kind: sizes for kind, sizes in layer.items() if kind not in ("cross", STATE)}
    return max((sum(sizes) if kind.startswith("sliding") else max(sizes) for kind, sizes in growing.items()), default=0)


def _tensors(arch: Architecture, attention: Attention, tokens: int) -> Iterable[tuple[str, str, Shape]]:
    """(kind, part, dims after the batch) of one layer."""
    if attention.variant == "mla":
        rank, rope = latent_widths(arch)
        return (("latent", "keys", (1, tokens, rank)), ("latent", "values", (1, tokens, rope)))
    heads, d = attention.cached_heads or attention.num_key_value_heads, attention.head_dim
    kind = "cross" if attention.cross else "full"
    if attention.window is not None and not attention.cross:
        kind, tokens = f"sliding {attention.window}", min(tokens, attention.window)
    return ((kind, "keys", (heads, tokens, d)), (kind, "values", (heads, tokens, attention.value_head_dim or d)))


def encoder_positions(arch: Architecture) -> int | None:
    """Positions of an encoder that always reads a whole window (Whisper's 30 s, padded), None where the input decides."""
    windows = (module for module in arch.modules if module.name == "model.encoder.embed_positions" and _hears(arch))
    return next((module.shape("weight")[0] for module in windows), None)


def _hears(arch: Architecture) -> bool:
    return any(module.name == "model.encoder.conv1" for module in arch.modules)


def latent_widths(arch: Architecture) -> tuple[int, int]:
    """(kv_lora_rank, qk_rope_head_dim) of an MLA model, as the weights show them: what one projection makes of a token."""
    by_leaf = {module.leaf: module for module in arch.modules}
    (rank,) = by_leaf["kv_a_layernorm"].shape("weight")
    return rank, by_leaf["kv_a_proj_with_mqa"].out_features - rank
