"""What packages of kernels, and decoders of a tool's own, keep on the card from step to step besides the model.

Source: unsloth, kernels/utils.py (`_scratch`), models/llama.py (`LlamaRotaryEmbedding`); unsloth_zoo, gradient_checkpointing.py;
nemo_automodel, components/models/llama/rope_utils.py (`_build_cache`).
"""

from __future__ import annotations

from math import prod

from peftplan.deployment.kv_cache import kv_cache
from peftplan.job.kernel_facts import Narrow
from peftplan.job.kernels import DELTA_RULES, SCANNING
from peftplan.memory.fused_attention import number
from peftplan.memory.model import Model
from peftplan.storage.config import FOUR_BIT
from peftplan.tape.tensors import Dims, Tensor
from peftplan.units import MIB

TE_WORKSPACE = 32 * MIB + 1024
"""Bytes of one of Transformer Engine's, from compute capability 9.0 (pytorch/cpp_extensions/gemm.py,
`get_cublas_workspace_size_bytes`)."""


def kept_on_card(model: Model) -> None:
    """What a package makes in the first step and keeps: buffers of offloaded inputs, rotary tables, one of a 4-bit weight."""
    f, running = model.tape, model.running
    decoder, checkpoint, lora = running.kernels.decoder, running.kernels.checkpoint, running.kernels.lora_mlp
    f.module = "model"
    if checkpoint is not None and running.hosted:
        dims = ("b", max(running.scored_rows, 1), model.seq, model.arch.hidden_size or 0)
        model.buffers = [f.new(dims, running.dtype, "buffer of offloaded inputs") for _ in range(checkpoint.buffers)]
    of_engine = running.kernels.dense is not None or running.kernels.exchange is not None
    if running.own_decoders and model.arch.model_type == "gpt_oss" and not of_engine:
        from peftplan.memory.models.automodel_moe import masks

        model.lasting = masks(model)
    elif running.own_decoders and of_engine:
        made_by = [kernel for kernel in (running.kernels.dense, running.kernels.experts) if kernel is not None]
        model.lasting = [f.new((TE_WORKSPACE,), "uint8", "workspace") for kernel in made_by for _ in range(kernel.workspaces)]
        if running.kernels.experts is not None and running.kernels.experts.narrow is not None:
            model.lasting += copies_in_8_bits(model, running.kernels.experts.narrow)
        if running.kernels.exchange is not None and running.kernels.exchange.hybrid:
            from peftplan.memory.models.automodel_ep import last_map

            model.lasting += last_map(model)
    elif running.own_decoders and model.arch.model_type == "glm4_moe":
        from peftplan.memory.models.automodel_ep import last_map

        model.lasting = last_map(model)
    elif decoder is not None or (running.own_decoders and model.arch.model_type not in (*SCANNING, *DELTA_RULES, "ministral3")):
        a = model.arch.blocks[0].attentions[0]
        width = a.head_dim if a.rotary_dim is None else a.rotary_dim
        of_gemma = model.arch.model_type in ("gemma", "gemma2")  # unsloth, models/gemma.py (`_set_cos_sin_cache`)
        in_fp32 = decoder is None or of_gemma
        rows: Dims = (model.seq,) if decoder is None else (running.rotary_rows,)
        if running.ring is not None:  # positions of the whole row
            rows = (model.seq, running.ring.ranks)
        elif running.kernels.attention is not None:  # as many as tokens
            rows = ("b", model.seq)
        model.lasting = [f.new((*rows, width), "fp32" if in_fp32 else running.dtype, name) for name in ("cos", "sin")]
        if decoder is not None and model.arch.model_type == "gemma2":  # unsloth, models/llama.py:1530
            model.lasting += [f.new((model.seq, model.seq), running.dtype, name) for name in ("SWA_mask", "GA_mask")]
    in_4_bits = model.quant is not None and model.quant.name in FOUR_BIT
    if lora is not None and lora.global_buffer and in_4_bits and not getattr(running.config, "lora_dropout", 0):
        largest = max(p.numel for p in model.parameters.all if p.quantized)
        model.lasting.append(f.new((largest,), running.dtype, "buffer of dequantized weights"))
    if running.recorded is not None:
        from peftplan.memory.models.recorded import left_by_first_step, masks_of_blocks, scales

        num_layers = sum(len(block.layers) for block in model.arch.blocks)
        of_layer = scales(running.recorded)
        model.lasting += [f.many(dims, "uint8", "scale of fake quantization", num_layers) for dims in of_layer]
        if running.recorded.tiles:  # of shorter rows they take less than 0.3 MB
            model.lasting += masks_of_blocks(f, model.arch)
            model.lasting += left_by_first_step(f, model.arch, seq=model.seq, dtype=running.dtype)
        if running.recorded.loss_op_by_op:
            from peftplan.memory.models.compiled import positions_and_masks

            model.lasting += positions_and_masks(model, running.dtype)  # of the forward in which torch failed to compile the loss
    if running.kept_caches:
        model.lasting += static_cache(model)
    for tensor in (*model.buffers, *model.lasting):
        assert tensor.storage is not None
        f.category[tensor.storage.number] = "buffers"


def static_cache(model: Model) -> list[Tensor]:
    """The cache of all rows that are written at once, of their greatest length. Left out: the last token is not fed."""
    f, running = model.tape, model.running
    of_token = kv_cache(model.arch, batch_size=running.kept_caches, context=1, encoder_context=0, dtype=running.dtype)
    return [f.many(("b", model.seq, prod(c.shape)), c.dtype, f"static cache, {c.part}", c.layers) for c in of_token]


def copies_in_8_bits(model: Model, narrow: Narrow) -> list[Tensor]:
    """Each expert's matrices in 8 bits, by row and by column (transformer-engine 2.20.2, pytorch/tensor/mxfp8_tensor.py,
    `get_scale_shape`, whose padding of other sizes is left out). The tool says which micro batch is the first, by which the layer
    keeps them (nemo_automodel, components/models/common/utils.py:978)."""
    f, tensors = model.tape, []
    layers = [layer for block in model.arch.blocks if block.mlp.variant == "moe" for layer in block.layers]
    for layer in layers:
        for name, matrix in model.part("model.layers.{}.mlp.experts", layer).params.items():
            if len(matrix.dims) < len(("expert", "row", "column")):  # a bias
                continue
            experts, rows, columns = map(number, matrix.dims)
            widths = (columns,) if narrow.of_weights is None else (columns, columns // narrow.of_weights.numbers)
            tensors += [f.many((rows, width), "uint8", f"copy of {name} in 8 bits", 2 * experts) for width in widths]
    return tensors
