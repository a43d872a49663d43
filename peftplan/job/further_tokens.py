"""The layers of Nemotron 3 and Qwen 3.5 that predict further tokens (multi-token prediction), as NeMo Automodel builds and runs
them.

Source: nemo_automodel 0.7.0, components/models/nemotron_v3/mtp.py (`build_nemotron_v3_mtp`, `NemotronV3MTPSublayer`) and model.py
(`NemotronHForCausalLM.__init__`); qwen3_5/model.py (`build_qwen3_5_dense_mtp`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from peftplan.arch.fields import Fields
from peftplan.arch.modules import Architecture, Module, linear, rmsnorm
from peftplan.arch.nemotron_h import OF_PATTERN
from peftplan.arch.readers import read_config

if TYPE_CHECKING:
    from peftplan.job.setup import Setup

STACK, OF_TEXT_PART = "mtp.layers.", "model.language_model.layers.{}"
OF_QWEN = ("qwen3_5", "qwen3_5_moe")
LETTERS = {kind: letter for letter, kind in OF_PATTERN.items()} | {"attention": "*", "mamba": "M"}
NONE_BUILT = "the model that runs has no layers that predict further tokens: mtp_depths changes nothing"


def depths_of(setup: Setup, config: Mapping[str, object], *, quantized: bool) -> int:
    """How many further tokens a position predicts: as many as its config says, if the setup does not. Over a base in 4 bits
    transformers' model runs, which has no such layers (_transformers/model_init.py, `_init_model`)."""
    if quantized or not setup.by.own_decoders:
        return 0
    if config.get("model_type") in OF_QWEN and isinstance(text := config.get("text_config"), Mapping):
        stated = Fields(text, name="text_config").int("mtp_num_hidden_layers", default=0, low=0)
        return stated if setup.mtp_depths is None else setup.mtp_depths
    if config.get("model_type") != "nemotron_h" or not _pattern(config):
        return 0
    stated = Fields(config, name="config").int("num_nextn_predict_layers", default=0, low=0)
    return stated if setup.mtp_depths is None else setup.mtp_depths


def with_further_tokens(architecture: Architecture, config: Mapping[str, object], *, shared: bool) -> Architecture:
    """The architecture with one such layer for each letter of the config's pattern. `shared`: all depths have the same ones;
    those of as many depths as the config says have their own each."""
    if architecture.model_type in OF_QWEN:
        return _with_attending_layer(architecture)
    pattern = _pattern(config)
    each = len(pattern)
    pattern *= 1 if shared else Fields(config, name="config").int("num_nextn_predict_layers", low=1)
    apart = {
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "layers_block_type": None,
        "layer_types": None,
    }
    head = read_config({**config, **apart}, name=architecture.name)
    modules = tuple(_sublayers(head, len(pattern), each))
    buffers = tuple(
        buffer._replace(name=buffer.name.replace("model.layers.{}", f"{STACK}{layer}"), layers=None)
        for buffer in head.buffers
        for layer in buffer.layers or ()
    )
    return replace(architecture, modules=(*architecture.modules, *modules), buffers=(*architecture.buffers, *buffers))


def _with_attending_layer(architecture: Architecture) -> Architecture:
    """The architecture with one more layer of attention, which joins what it reads and ends in a norm."""
    h, layer = architecture.hidden_size or 0, f"{STACK}0"
    attending = next(block.layers[0] for block in architecture.blocks if block.delta_rule is None)
    before = tuple(module for module in architecture.modules if attending in (module.layers or ()))
    own = (m._replace(name=m.name.replace(OF_TEXT_PART, layer), layers=None) for m in before if OF_TEXT_PART in m.name)
    joining = (rmsnorm(f"{layer}.enorm", h), rmsnorm(f"{layer}.hnorm", h), linear(f"{layer}.eh_proj", 2 * h, h))
    return replace(architecture, modules=(*architecture.modules, *own, *joining, rmsnorm(f"{layer}.final_layernorm", h)))


def attends_then_mixes(architecture: Architecture) -> bool:
    """Whether a depth is a layer of attention and one of experts, as in all that were published."""
    names = {module.name for module in architecture.modules if module.name.startswith(STACK)}
    layers = {name.removeprefix(STACK).split(".")[0] for name in names}
    return layers == {"0", "1"} and {f"{STACK}0.mixer.q_proj", f"{STACK}1.mixer.experts"} <= names


def _sublayers(head: Architecture, count: int, each: int) -> Iterator[Module]:
    """Their modules, `each` of a depth: norms of what its first one reads and the product that joins it, and a norm behind its
    last one."""
    h = head.hidden_size
    for layer in range(count):
        name = f"{STACK}{layer}"
        for module in head.modules:
            if layer in (module.layers or ()):
                yield module._replace(name=module.name.replace("model.layers.{}", name), layers=None)
        if layer % each == 0:
            yield from (rmsnorm(f"{name}.enorm", h), rmsnorm(f"{name}.hnorm", h), linear(f"{name}.eh_proj", 2 * h, h))
        if layer % each == each - 1:
            yield rmsnorm(f"{name}.final_layernorm", h)


def _pattern(config: Mapping[str, object]) -> str:
    """A letter for each layer of a depth; none where the config has no such layers."""
    fields = Fields(config, name="config")
    kinds = fields.strs("mtp_layers_block_type", default=())
    return fields.str("mtp_hybrid_override_pattern", default="") or "".join(LETTERS.get(kind, "") for kind in kinds)
