"""The merged model's checkpoint: what `save_pretrained` writes of it, in how many files, to the byte.

Source: transformers, `modeling_utils.py` (`save_pretrained`, `remove_tied_weights_from_state_dict`) and
`conversion_mapping.py` (names and shapes go back to those of the hub); huggingface_hub 1.x, `serialization/_base.py`
(`split_state_dict_into_shards_factory`). Left out: `config.json` and its kin, the index of a sharded checkpoint, checkpoints of
quantized models; ModernBERT's first layer lacks a norm, so its tensors come in another order, which only shards would show.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from peftplan.arch.modules import Architecture, Shape
from peftplan.deployment.safetensors import StoredTensor, file_bytes
from peftplan.methods.adaptation import Adaptation
from peftplan.parameters import Parameters
from peftplan.units import GB

MAX_SHARD_BYTES = 50 * GB
"""`save_pretrained(max_shard_size="50GB")`, the default of transformers 5."""

PERSISTENT_BUFFERS = ("final_logits_bias", "e_score_correction_bias", "layer_scalar", "act_fn.beta", "act_fn.eps")
"""Buffers that are part of a state dict, by the last part of their name (BART, DeepSeek-V3, Gemma 4, Apertus)."""

_ONE_BY_ONE = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERTS: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "nemotron_h": {"up_proj": ("up_proj",), "down_proj": ("down_proj",)},
    **dict.fromkeys(
        (
            "olmoe",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_5_moe_text",
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe",
            "glm4_moe_lite",
        ),
        _ONE_BY_ONE,
    ),
}
"""model_type → what one expert's matrices are called in a checkpoint, which holds them one by one."""

RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": ((r"\.mlp\.", ".block_sparse_moe."),),
    **dict.fromkeys(
        ("granitemoe", "granitemoehybrid"),
        (
            (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
            (r"\.experts\.down_proj$", ".output_linear.weight"),
            (r"\.router\.weight$", ".router.layer.weight"),
        ),
    ),
    "gpt_neox": ((r"^lm_head\.", "embed_out."),),
    "nemotron_h": ((r"^model\.", "backbone."),),
    "vit": (
        (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
        (r"\.attention\.(q|k|v)_proj\.", r".attention.attention.\1_proj."),
        (r"\.q_proj\.", ".query."),
        (r"\.k_proj\.", ".key."),
        (r"\.v_proj\.", ".value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
}
"""model_type → what `save_pretrained` renames back, in this order."""


Storage = tuple[StoredTensor, ...]
"""Tensors of one storage, which stay in one file: the same matrix of all experts of a layer, else one tensor."""


def merged_storages(arch: Architecture, adaptation: Adaptation, parameters: Parameters, *, dtype: str) -> tuple[Storage, ...]:
    """Every tensor of the merged model's checkpoint, in the order of its state dict.

    `parameters` are those of the base that is merged into, not quantized, loaded in `dtype`. A merge keeps each weight's dtype
    and shape; a copy in `modules_to_save` replaces its module, and so breaks a tie.
    """
    dtypes = {p.name: p.dtype for p in parameters.all if p.owner == "base"}
    tied_names = _names_of_ties(arch, adaptation)
    owners = dict(arch.ties)
    names: list[tuple[str, str, Shape]] = []
    for module in arch.modules:
        for param, shape in module.params:
            key = f"{module.name}.{param}".lstrip(".")
            if tied_names.get(key, key) == key:
                param_dtype = dtypes[owners.get(key, key)]
                names += [(f"{name}.{param}".lstrip("."), param_dtype, shape) for name in module.names()]
    for buffer in arch.buffers:
        if buffer.name.endswith(PERSISTENT_BUFFERS):
            buffer_dtype = dtype if buffer.dtype == "model" else buffer.dtype
            for i in buffer.layers or (None,):
                name = buffer.name if i is None else buffer.name.replace("{}", str(i))
                names.append((name, buffer_dtype, buffer.shape))
    tensors = [StoredTensor(*entry) for entry in names]
    sorts = any(_is_turned_back(arch.model_type, tensor.name) for tensor in tensors)
    ordered = sorted(tensors, key=lambda tensor: _natural(tensor.name)) if sorts else _in_order(tensors)
    return tuple(storage for tensor in ordered for storage in _as_on_the_hub(arch.model_type, tensor))


def shards(storages: Iterable[Storage], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> tuple[int, ...]:
    """Bytes of each file: a new one begins where the next storage would make the tensors of one exceed `max_shard_bytes`.

    A storage larger than that gets a file of its own; the next one continues the file before it.
    """
    files: list[list[Storage]] = []
    current: list[Storage] = []
    size = 0
    for storage in storages:
        nbytes = sum(tensor.nbytes for tensor in storage)
        if nbytes > max_shard_bytes:
            files.append([storage])
            continue
        if size + nbytes > max_shard_bytes:
            files.append(current)
            current, size = [], 0
        current.append(storage)
        size += nbytes
    return tuple(file_bytes(tensor for storage in file for tensor in storage) for file in (*files, current) if file)


def _names_of_ties(arch: Architecture, adaptation: Adaptation) -> dict[str, str]:
    """Parameter → the name under which its storage is saved, for what shares one.

    The input embedding's name wins, or the owner's; where both have been copied, the alphabetically last of the others.
    """
    copied = {re.sub(r"\.modules_to_save(?=\.)", "", t.name) for t in adaptation.added if ".modules_to_save." in t.name}
    groups: dict[str, list[str]] = {}
    for alias, owner in arch.ties:
        groups.setdefault(owner, [owner]).append(alias)
    saved_as: dict[str, str] = {}
    for members in groups.values():
        together = [name for name in members if name not in copied]
        embedding = f"{arch.input_embedding}.weight"
        for name in together:
            saved_as[name] = next((main for main in (embedding, members[0]) if main in together), max(together))
    return saved_as


def _in_order(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """The order of `state_dict()`: depth first, a module's own tensors before its children, numbered children by number."""
    root = _Module({}, {})
    for tensor in tensors:
        module = root
        *path, leaf = tensor.name.split(".")
        for part in path:
            module = module.children.setdefault(part, _Module({}, {}))
        module.tensors[leaf] = tensor
    yield from root.in_order()


class _Module(NamedTuple):
    """A module's own tensors and its children, by the last part of their names."""

    tensors: dict[str, StoredTensor]
    children: dict[str, "_Module"]

    def in_order(self) -> Iterator[StoredTensor]:
        yield from self.tensors.values()
        numbered = all(name.isdigit() for name in self.children)
        # a layer of LFM2 makes attention where others make `conv`; one of Falcon-H1 makes `mamba` before it
        first = sorted(self.children, key=lambda name: "mamba" not in self.children and name != "self_attn")
        for name in sorted(self.children, key=int) if numbered else first:
            yield from self.children[name].in_order()


def _natural(name: str) -> list[tuple[int, int | str]]:
    """The order in which names are turned back (`revert_weight_conversion` sorts by `dot_natural_key`)."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _experts(model_type: str, name: str) -> tuple[str, ...]:
    """What one expert's part of a fused parameter is called, nothing for any other tensor."""
    holder, _, param = name.rpartition(".")
    return EXPERTS.get(model_type, {}).get(param, ()) if holder.endswith(".experts") else ()


def _is_turned_back(model_type: str, name: str) -> bool:
    return bool(_experts(model_type, name)) or _renamed(model_type, name) != name


def _as_on_the_hub(model_type: str, tensor: StoredTensor) -> Iterator[Storage]:
    """The tensor under the names of the checkpoint: fused experts one by one, old names back."""
    matrices = _experts(model_type, tensor.name)
    if not matrices:
        yield (tensor._replace(name=_renamed(model_type, tensor.name)),)
        return
    experts, rows, columns = tensor.shape
    holder = tensor.name.rpartition(".")[0]
    for matrix in matrices:
        names = (_renamed(model_type, f"{holder}.{expert}.{matrix}.weight") for expert in range(experts))
        yield tuple(StoredTensor(name, tensor.dtype, (rows // len(matrices), columns)) for name in names)


def _renamed(model_type: str, name: str) -> str:
    for pattern, old in RENAMES.get(model_type, ()):
        name = re.sub(pattern, old, name)
    return name
