"""What an architecture consists of: module families, blocks, and the frozen `Architecture` that contains them.

A *family* is one module, or one per layer: `model.layers.{}.self_attn.q_proj` for layers 0 … 79. Only `inspect`, patterns and
tests expand names; everything else counts a family once and multiplies by its number of copies.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

from peftplan.arch.blocks import Block

Shape = tuple[int, ...]

LINEAR_KINDS = ("Linear", "LinearSubclass", "Conv1D")
"""Kinds that peft's `all-linear` selects: `isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))`."""


class Module(NamedTuple):
    """One family of modules that own parameters directly.

    `kind` is the torch class that other libraries test for: `Linear`, `LinearSubclass` (not exactly `nn.Linear`), `Conv1D`,
    `Embedding`, `LayerNorm`, `RMSNorm`, `Conv1d`, `Conv2d`, `Conv3d`; `Router` and `Experts` for transformers' fused
    mixture-of-experts modules (`ExpertsTransposed` where the class states `is_transposed`: experts, in, out; `ExpertsApart` where
    a trainer has a linear layer for each of these); `Module` for anything else. `params` are the direct parameters with torch's
    shapes, in order.
    """

    name: str
    kind: str
    params: tuple[tuple[str, Shape], ...]
    layers: tuple[int, ...] | None = None

    @property
    def copies(self) -> int:
        """The number of modules in this family."""
        return 1 if self.layers is None else len(self.layers)

    def names(self) -> Iterator[str]:
        """The full name of every module of the family, as `named_modules()` gives it."""
        if self.layers is None:
            yield self.name
        else:
            for layer in self.layers:
                yield self.name.replace("{}", str(layer))

    def shape(self, param: str) -> Shape:
        """Shape of one direct parameter. Raises KeyError if the module has none of that name."""
        return dict(self.params)[param]

    @property
    def leaf(self) -> str:
        """The last part of the name: `q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def in_features(self) -> int:
        """Input width of a linear layer (Conv1D stores its weight transposed) or of a convolution; num_embeddings."""
        weight = self.shape("weight")
        return weight[0] if self.kind in ("Conv1D", "Embedding") else weight[1]

    @property
    def out_features(self) -> int:
        """Output width of a linear layer (Conv1D stores its weight transposed) or of a convolution; embedding_dim."""
        weight = self.shape("weight")
        return weight[1] if self.kind in ("Conv1D", "Embedding") else weight[0]


class Buffer(NamedTuple):
    """One family of registered buffers: tensors on the device that never train.

    `dtype` is one of `dtypes.ITEMSIZE`, or `model`: the dtype that the model is loaded in (a float buffer made in its default).
    """

    name: str
    dtype: str
    shape: Shape
    layers: tuple[int, ...] | None = None


class Dropout(NamedTuple):
    """Dropout probabilities in training. At 0 no mask is allocated.

    `hidden`: after each sublayer of a block. `attention`: on the attention weights. `activation`: after the MLP's activation.
    `classifier`: before the head of a task.
    """

    hidden: float = 0.0
    attention: float = 0.0
    activation: float = 0.0
    embedding: float = 0.0
    classifier: float = 0.0


NO_DROPOUT = Dropout()


class PromptDims(NamedTuple):
    """What peft's virtual-token methods read from a model's config (`_prepare_prompt_learning_config`, peft/utils/other.py).

    `num_attention_heads` is None if the config has no name that peft knows (MPT's `n_heads`). peft then reads its own config.
    """

    num_layers: int
    token_dim: int
    num_attention_heads: int | None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_transformer_submodules: int = 1


TOWERS = ("vision", "visual", "audio")
"""Parts of the names of what reads pictures or sound."""


@dataclass(frozen=True)
class Architecture:
    """Every weight of a model as named tensors, and the blocks that they form.

    `modules`: in the order of first appearance in `named_modules()` of transformers' `model_class`.
    `ties`: pairs of a parameter's name and the name of the one whose storage it shares.
    `keep_in_fp32`: the class's `_keep_in_fp32_modules`.
    `keep_in_fp32_strict`: its `_keep_in_fp32_modules_strict`, patterns of parameter names that stay fp32 in a bf16 model too.
    `frozen`: parameters that the class creates with `requires_grad=False`; `from_pretrained` undoes it.
    `logits_ops`: what the class does to the head's output: `scale`, `softcap` (divide, tanh, multiply), `float`.
    `supports_sdpa`: its `_supports_sdpa`; without it transformers falls back to eager attention. `supports_flash_attn`: its
    `_supports_flash_attn`.
    `picture`: channels, height and width of the images that the model reads in place of text.
    `max_positions`: rows of the table of absolute positions (Whisper: the decoder's); None without a table.
    """

    model_type: str
    model_class: str
    task_type: str
    modules: tuple[Module, ...]
    blocks: tuple[Block, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()
    buffers: tuple[Buffer, ...] = ()
    hidden_size: int = 0
    vocab_size: int = 0
    input_embedding: str | None = None
    output_embedding: str | None = None
    keep_in_fp32: tuple[str, ...] = ()
    keep_in_fp32_strict: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    logits_ops: tuple[str, ...] = ()
    supports_sdpa: bool = True
    supports_flash_attn: bool = True
    prompt: PromptDims | None = None
    dropout: Dropout = NO_DROPOUT
    picture: Shape = ()
    max_positions: int | None = None
    name: str = ""
    source: str = ""
    notes: tuple[str, ...] = field(default=())
    asides: tuple[str, ...] = field(default=())
    """Notes that change no number."""

    @cached_property
    def tied_names(self) -> frozenset[str]:
        """Names of the parameters that share another's storage and are not counted."""
        return frozenset(alias for alias, _ in self.ties)

    def names_of(self, name: str) -> tuple[str, ...]:
        """The name of a parameter, and of those that share its storage."""
        return (name, *(alias for alias, owner in self.ties if owner == name))

    @cached_property
    def encoder_layers(self) -> int:
        """The number of an encoder's layers."""
        return sum(len(block.layers) for block in self.blocks if block.stack == "encoder")

    @cached_property
    def decoder(self) -> str:
        """The name of the module that embeds the tokens and runs the layers."""
        return str(self.input_embedding).rpartition(".")[0]

    @cached_property
    def has_towers(self) -> bool:
        """Whether it is a language model that reads pictures or sound too."""
        names = (module.name.split(".") for module in self.modules)
        of_words = self.task_type in ("CAUSAL_LM", "SEQ_CLS")
        return of_words and any(word in part for parts in names for part in parts[:2] for word in TOWERS)

    def owned_params(self, module: Module) -> tuple[tuple[str, Shape], ...]:
        """Direct parameters of a module, except those tied to another module's."""
        return tuple((p, shape) for p, shape in module.params if f"{module.name}.{p}" not in self.tied_names)

    @cached_property
    def num_parameters(self) -> int:
        """The number of parameters. A tied tensor counts once."""
        return sum(m.copies * sum(prod(shape) for _, shape in self.owned_params(m)) for m in self.modules)

    @cached_property
    def containers(self) -> frozenset[str]:
        """Names of the modules that own no parameters and only hold others, with `{}` for layers."""
        prefixes: set[str] = set()
        for module in self.modules:
            parts = module.name.split(".")
            prefixes.update(".".join(parts[:i]) for i in range(1, len(parts)))
        return frozenset(prefixes - {module.name for module in self.modules})

    def named_parameters(self) -> Iterator[tuple[str, Shape]]:
        """Every parameter with its full name, as `named_parameters()` of the real model gives it (ties once)."""
        for module in self.modules:
            for name in module.names():
                for param, shape in self.owned_params(module):
                    yield f"{name}.{param}" if name else param, shape

    def last_module(self) -> Module:
        """The module that owns the last parameter of `named_parameters()`. bitsandbytes does not quantize it."""
        return next(m for m in reversed(self.modules) if self.owned_params(m))


VALUE_HEAD = "v_head.summary"
"""The head that trl adds beside the logits once the base is loaded, so that no format stores it."""


def linear(name: str, n_in: int, n_out: int, bias: bool = False, layers: tuple[int, ...] | None = None) -> Module:
    """An `nn.Linear`: weight (n_out, n_in), bias (n_out)."""
    return Module(name, "Linear", (("weight", (n_out, n_in)), *((("bias", (n_out,)),) if bias else ())), layers)


def conv1d(name: str, n_in: int, n_out: int, layers: tuple[int, ...] | None = None) -> Module:
    """transformers' `Conv1D` (GPT-2): weight (n_in, n_out), the transpose of `nn.Linear`'s, and bias (n_out)."""
    return Module(name, "Conv1D", (("weight", (n_in, n_out)), ("bias", (n_out,))), layers)


def embedding(name: str, rows: int, width: int, layers: tuple[int, ...] | None = None) -> Module:
    """An `nn.Embedding`: weight (rows, width)."""
    return Module(name, "Embedding", (("weight", (rows, width)),), layers)


def rmsnorm(name: str, width: int, layers: tuple[int, ...] | None = None) -> Module:
    """An RMSNorm: one weight vector."""
    return Module(name, "RMSNorm", (("weight", (width,)),), layers)


def layernorm(name: str, width: int, bias: bool = True, layers: tuple[int, ...] | None = None) -> Module:
    """An `nn.LayerNorm` with an affine weight and, usually, a bias."""
    return Module(name, "LayerNorm", (("weight", (width,)), *((("bias", (width,)),) if bias else ())), layers)
