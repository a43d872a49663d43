"""ViT (transformers, models/vit/modeling_vit.py): patches of a picture and a class token through a pre-norm encoder."""

from __future__ import annotations

from peftplan.arch.blocks import Block
from peftplan.depth.stack import run_stack
from peftplan.memory.activations import activation
from peftplan.memory.attention import attend
from peftplan.memory.calls import behind
from peftplan.memory.convolution import convolution
from peftplan.memory.kinds import kinds_of
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import cat
from peftplan.tape.tensors import Tensor

PATCHES = "vit.embeddings.patch_embeddings.projection"


def vit(model: Model) -> Tensor:
    """`ViTModel.forward`."""
    model.can_cache = False
    block = model.arch.blocks[0]
    weight = model.part(PATCHES).weight
    assert weight is not None
    model.tape.module = "vit"
    picture = model.tape.to(model.batch["pixel_values"], weight.dtype)
    x = embedded = embeddings(model, picture)

    def layer(number: int, x: Tensor) -> Tensor:
        return encoder_layer(model, block, number, x)

    x = run_stack(model, kinds_of(model, "encoder"), x, layer, name="layers", checkpointed=model.running.checkpointing)
    x = model.layernorm("vit.layernorm", x)
    del embedded
    return x


def embeddings(model: Model, picture: Tensor) -> Tensor:
    """`ViTEmbeddings.forward`: the patches projected, a class token before them, positions."""
    f, h = model.tape, model.arch.hidden_size
    params = model.part("vit.embeddings").params
    positions, token = params["position_embeddings"], params["cls_token"]
    count = positions.dims[1]
    assert isinstance(count, int)
    patches = convolution(model, PATCHES, picture, ("b", h, count - 1))
    patches = model.asking_gradient(patches.view(("b", count - 1, h)))
    f.module = "vit.embeddings"
    x = cat(f, (ops.expanded(f, token, ("b", 1, h)), patches), ("b", count, h))
    del patches
    x = ops.add(f, x, positions)
    f.module = "vit.embeddings.dropout"
    return ops.dropout(f, x, model.arch.dropout.embedding)


def encoder_layer(model: Model, block: Block, number: int, x: Tensor) -> Tensor:
    """`ViTLayer.forward`."""
    f, name, p = model.tape, "vit.layers.{}", model.arch.dropout.hidden
    residual = x
    x = model.layernorm(f"{name}.layernorm_before", x, number)
    x = behind(model, f"{name}.attention_adapters", attention(model, block, number, x), number)
    f.module = f"{name}.dropout"
    x = ops.dropout(f, x, p)
    f.module = name
    x = ops.add(f, x, residual)
    residual = x
    x = model.layernorm(f"{name}.layernorm_after", x, number)
    x = behind(model, f"{name}.output_adapters", mlp(model, block, number, x), number)
    f.module = f"{name}.dropout"
    x = ops.dropout(f, x, p)
    f.module = name
    return ops.add(f, x, residual)


def attention(model: Model, block: Block, number: int, x: Tensor) -> Tensor:
    """`ViTAttention.forward`."""
    a, name = block.attentions[0], "vit.layers.{}.attention"
    dims = ("b", a.num_attention_heads, x.dims[1], a.head_dim)
    q, k, v = (model.linear(f"{name}.{part}_proj", x, number).view(dims) for part in "qkv")
    model.tape.module = name
    out = attend(model, a, q, k, v, dropout=model.arch.dropout.attention, rotated=False)
    return model.linear(f"{name}.o_proj", out, number)


def mlp(model: Model, block: Block, number: int, x: Tensor) -> Tensor:
    """`ViTMLP.forward`."""
    name = "vit.layers.{}.mlp"
    x = model.linear(f"{name}.fc1", x, number)
    model.tape.module = f"{name}.activation_fn"
    x = activation(model.tape, x, block.mlp.activation)
    return model.linear(f"{name}.fc2", x, number)
