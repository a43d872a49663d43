"""ViT: an image as a sequence of patches and one class token, through a pre-norm encoder.

Source: transformers, `models/vit/{configuration,modeling}_vit.py`. Left out: masked image modeling.
"""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, attach, check_task, dropout_of, num_labels, prompt_dims
from peftplan.arch.modules import Architecture, Module, layernorm, linear
from peftplan.errors import InputError

TASKS = ("IMAGE_CLS", "FEATURE_EXTRACTION")


def vit(c: Fields, task_type: str) -> Architecture:
    """ViT with a classifier on the class token, or the bare model with its pooler."""
    check_task(task_type, TASKS, model_type="vit")
    h = c.int("hidden_size")
    if task_type == "IMAGE_CLS":
        model = attach(_backbone(c, ()), task_type, (linear("classifier", h, num_labels(c), True),))
    else:
        pooler = linear("pooler.dense", h, c.int("pooler_output_size", default=h), True)
        model = attach(_backbone(c, (pooler,)), task_type, ())
    return replace(model, picture=(c.int("num_channels"), *_sides(c, "image_size")))


def _sides(c: Fields, name: str) -> tuple[int, int]:
    """(height, width) of a field that states one number for both, or two."""
    if not isinstance(c.raw.get(name), (list, tuple)):
        side = c.int(name)
        return side, side
    sides = c.ints(name, low=1)
    if len(sides) != 2:
        raise InputError(f"{c.name}: {name}", sides, "accepted: a whole number, or two")
    return sides[0], sides[1]


def _backbone(c: Fields, pooler: tuple[Module, ...]) -> Backbone:
    """The bare encoder. `embeddings` itself owns the class token, and one position per patch and for the class token."""
    h, a, i = c.int("hidden_size"), c.int("num_attention_heads"), c.int("intermediate_size")
    d = c.int("head_dim", default=c.divide("hidden_size", h, "num_attention_heads", a))
    layers, qkv_bias = c.layers("num_hidden_layers"), c.bool("qkv_bias", default=True)
    (image_h, image_w), (patch_h, patch_w) = _sides(c, "image_size"), _sides(c, "patch_size")
    patches = (image_h // patch_h) * (image_w // patch_w)
    patch_weight = (h, c.int("num_channels"), patch_h, patch_w)
    return Backbone(
        model_type="vit",
        stem="ViT",
        prefix="vit",
        modules=(
            Module("embeddings", "Module", (("cls_token", (1, 1, h)), ("position_embeddings", (1, patches + 1, h)))),
            Module("embeddings.patch_embeddings.projection", "Conv2d", (("weight", patch_weight), ("bias", (h,)))),
            *(linear(f"layers.{{}}.attention.{name}_proj", h, a * d, qkv_bias, layers) for name in ("q", "k", "v")),
            linear("layers.{}.attention.o_proj", a * d, h, True, layers),
            layernorm("layers.{}.layernorm_before", h, layers=layers),
            layernorm("layers.{}.layernorm_after", h, layers=layers),
            linear("layers.{}.mlp.fc1", h, i, True, layers),
            linear("layers.{}.mlp.fc2", i, h, True, layers),
            layernorm("layernorm", h),
            *pooler,
        ),
        blocks=(
            Block(
                stack="encoder",
                layers=layers,
                attentions=(Attention(a, a, d, positions="learned", causal=False),),
                mlp=Mlp("plain", i, c.str("hidden_act", default="gelu")),
                norm="layernorm",
            ),
        ),
        hidden_size=h,
        prompt=prompt_dims(c, len(layers), h, a),
        dropout=dropout_of(c, default=0.0),
    )
