"""What is alive while Unsloth's policy reads its prompts: layers that torch compiles for training, run in other ways.

b prompts that are read at once, s tokens of one.
"""

from collections.abc import Iterable

from peftplan.deployment.kv_cache import CacheTensor
from peftplan.memory.model import Model
from peftplan.memory.models.compiled import compiled_layers
from peftplan.tape.tensors import Tensor


def prompt_in_parts(model: Model, cache: Iterable[CacheTensor]) -> Tensor:
    """The prompt's forward of layers that torch compiles for training: then their attention is eager, over the whole cache, which
    a layer allocates when it first runs. The last layer's scores are alive beside the caches of all.

    Left out: in generation, hidden states stay in 16 bits.
    Source: unsloth_zoo 2026.10.9, temporary_patches/gpt_oss.py (`inplace_eager_attention_forward`, `_eager_attention_rows`).
    """
    f, dtype, a = model.tape, model.running.dtype, model.arch.blocks[0].attentions[0]
    hidden = compiled_layers(model)
    f.module = "model.layers"
    positions = max(tensor.shape[-2] for tensor in cache)
    caches = [f.many(("b", *tensor.shape[1:]), dtype, f"KV cache, {tensor.part}", tensor.layers) for tensor in cache]
    of_tokens = [f.new(("b", "s", model.arch.hidden_size or 0), dtype, name) for name in ("embedded", "residual", "normed")]
    query = f.new(("b", "s", a.num_attention_heads, a.head_dim), dtype, "query")
    repeated = [f.new(("b", a.num_attention_heads, positions, a.head_dim), dtype, "repeat_kv") for _ in ("keys", "values")]
    scores = f.new(("b", a.num_attention_heads, "s", positions + 1), dtype, "combined_logits")
    wide = [f.new(scores.dims, "fp32", name) for name in ("to", "softmax")]
    del caches, of_tokens, query, repeated, scores, wide
    return hidden


def prompt_in_functions(model: Model, cache: Iterable[CacheTensor], of_step: tuple[int, int]) -> Tensor:
    """The prompt's forward of layers that torch compiles for training, whose functions it compiles one by one here, in the last
    layer's MLP: norms in fp32 where their weights are, beside the caches of all layers, which are as long as all will be, and the
    buffers of offloaded inputs, which last.

    Source: unsloth 2026.10.9, models/_block_compile.py:934; unsloth_zoo, compiler.py (`Qwen2MLP_forward`); transformers,
    cache_utils.py (`StaticLayer.lazy_initialization`).
    """
    f, dtype, width = model.tape, model.running.dtype, model.arch.hidden_size or 0
    attention, checkpoint = model.arch.blocks[0].attentions[0], model.running.kernels.checkpoint
    assert model.running.recorded is not None
    f.module = "model.layers"
    num_buffers = 0 if checkpoint is None else checkpoint.buffers
    buffers = [f.new((*of_step, width), dtype, "buffer of offloaded inputs") for _ in range(num_buffers)]
    tables = [f.new(("b", "s", attention.rotary_dim or attention.head_dim), dtype, name) for name in ("cos", "sin")]
    caches = [f.many(("b", *tensor.shape[1:]), dtype, f"KV cache, {tensor.part}", tensor.layers) for tensor in cache]
    of_tokens = [f.new(("b", "s", width), dtype, name) for name in ("embedded", "of the layer", "residual", "up_proj's input")]
    normed = f.new(("b", "s", width), "fp32" if model.running.recorded.wide_norm else dtype, "normed")
    gated = [f.new(("b", "s", model.arch.blocks[0].mlp.intermediate_size), dtype, name) for name in ("gate_proj", "up_proj")]
    del buffers, tables, caches, of_tokens, normed, gated
    return compiled_layers(model)
