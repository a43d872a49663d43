"""What any peft method can train besides its adapter: copies of whole modules, and rows of an embedding.

Source: peft, `utils/other.py` (`_set_trainable`, `ModulesToSaveWrapper`, `set_additional_trainable_modules`) and
`peft_model.py` (`PeftModelForSequenceClassification` and its siblings, which add the head of their task).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from peftplan.arch.modules import Architecture, Module
from peftplan.errors import InputError, RefusedError, near_names
from peftplan.methods.adaptation import AddedBuffer, AddedTensor, NeedsPeftError, restricted

SAVED_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that peft adds to `modules_to_save` by task type."""
KNOWN_BEFORE_MATCHING = ("SEQ_CLS",)
"""Tasks whose head peft adds before it matches targets, so that no target can be in the head."""
ALL_HEADS = frozenset(head for heads in SAVED_HEADS.values() for head in heads)

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "lm_head")
"""Last names of input and output embeddings."""

TIED_BY_CLASS = ("t5", "mt5")
"""Model types whose config class always states tied embeddings. peft reads the config, not the checkpoint."""

TokenIndices = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None


class SavesModules(Protocol):
    """A configuration with peft's `modules_to_save`."""

    @property
    def modules_to_save(self) -> tuple[str, ...] | None: ...


def saved_modules(arch: Architecture, config: SavesModules) -> tuple[str, ...]:
    """`modules_to_save` as peft completes it by task type."""
    return tuple(dict.fromkeys((*(config.modules_to_save or ()), *SAVED_HEADS.get(arch.task_type, ()))))


def never_targeted(arch: Architecture, config: SavesModules) -> tuple[str, ...]:
    """The part of `modules_to_save` that peft already knows when it matches targets."""
    heads = SAVED_HEADS[arch.task_type] if arch.task_type in KNOWN_BEFORE_MATCHING else ()
    return tuple(dict.fromkeys((*(config.modules_to_save or ()), *heads)))


def refuse_targeted(matched: Iterable[Module], copies: Iterable[AddedTensor]) -> None:
    """Raise RefusedError if a targeted module would also be saved, NeedsPeftError if it lies inside a saved one."""
    saved = {t.name.rpartition(".")[0] for t in copies}
    for module in matched:
        if f"{module.name}.modules_to_save" in saved:
            raise RefusedError(
                f"target_modules: {module.name} is targeted and saved by modules_to_save, which peft refuses with a TypeError; "
                "name the targets, or exclude it with exclude_modules"
            )
        if any(name.replace(".modules_to_save", "") == module.name for name in saved):
            raise NeedsPeftError(f"modules_to_save of a module that holds the target {module.name}")


def refuse_targeted_rows(matched: Iterable[Module], deltas: Iterable[AddedTensor]) -> None:
    """Raise RefusedError if rows of an embedding would train that an adapter wraps too."""
    names = {t.name.removesuffix(".token_adapter.trainable_tokens_delta") for t in deltas}
    for module in matched:
        if module.kind == "Embedding" and module.name in names:
            raise RefusedError(
                f"trainable_token_indices: {module.name} is also targeted by target_modules, which peft refuses with a TypeError"
            )


def saved_copies(arch: Architecture, names: Iterable[str]) -> tuple[AddedTensor, ...]:
    """The trainable copies that `modules_to_save` makes: every parameter under a module whose name ends with one of `names`.

    A copy holds its own tensors, also of a tied weight. Raises InputError for a name that the user gave and that no module ends
    with, NeedsPeftError for a saved module inside another one; heads added by task type may be absent.
    """
    names = tuple(names)
    _refuse_nested([root for name in names for root in _roots(arch, name)])
    copies: list[AddedTensor] = []
    copied: set[tuple[str, int | None]] = set()
    for suffix in names:
        roots = _roots(arch, suffix)
        if not roots and suffix not in ALL_HEADS:
            raise InputError("modules_to_save", suffix, f"no module ends with it; {_near(arch, suffix)}")
        for root, layers in roots:
            for module in arch.modules:
                if module.name != root and not module.name.startswith(root + "."):
                    continue
                copied_layers = [
                    i for i in module.layers or (None,) if (layers is None or i in layers) and (module.name, i) not in copied
                ]
                copied |= {(module.name, i) for i in copied_layers}
                if copied_layers:
                    indices = None if module.layers is None else tuple(i for i in copied_layers if i is not None)
                    copies += _copies(arch, root, module if indices is None else restricted(module, indices))
    return tuple(copies)


def tied_copies(arch: Architecture, copies: Iterable[AddedTensor]) -> tuple[AddedTensor, ...]:
    """The copies that are left where a head that is tied to the embedding reads the embedding's copy (`ensure_weight_tying`).

    Source: peft, tuners/lora/model.py (`_add_modules_to_save_to_tie`). Raises NeedsPeftError for a head that is saved
    without its embedding.
    """
    copies = tuple(copies)
    copied, ties = is_saved(copies), dict(arch.ties)
    if any(alias in copied and owner not in copied for alias, owner in ties.items()):
        raise NeedsPeftError("ensure_weight_tying of a head in modules_to_save without its embedding")
    return tuple(copy for copy in copies if copy.name.replace(".modules_to_save", "") not in ties)


def _refuse_nested(roots: list[tuple[str, frozenset[int] | None]]) -> None:
    for outer, layers in roots:
        for inner, inner_layers in roots:
            if inner.startswith(outer + ".") and (layers is None or inner_layers is None or layers & inner_layers):
                raise NeedsPeftError(f"modules_to_save of {inner} inside {outer}, which is saved too")


def is_saved(copies: Iterable[AddedTensor]) -> frozenset[str]:
    """Names, as templates, of the base parameters that `modules_to_save` copies. The originals are frozen."""
    return frozenset(t.name.replace(".modules_to_save", "") for t in copies)


def token_deltas(arch: Architecture, tokens: TokenIndices) -> tuple[AddedTensor, ...]:
    """`trainable_token_indices`: one row of deltas per token. A tied head shares those of the embedding.

    If several entries have the same tokens, peft leaves out those that are the full name of a module tied to the embedding.
    """
    if not tokens:
        return ()
    if not isinstance(tokens, Mapping):
        tokens = {(arch.input_embedding or "embed_tokens").rpartition(".")[2]: tokens}
    shared = _tied_to_embedding(arch)
    if len(tokens) > 1 and arch.model_type in TIED_BY_CLASS and arch.output_embedding not in shared:
        raise NeedsPeftError(f"trainable_token_indices of several modules of an untied {arch.model_type}")
    skipped = shared if len(tokens) > 1 and len(set(map(tuple, tokens.values()))) == 1 else frozenset()
    owners = {alias.rpartition(".")[0]: owner.rpartition(".")[0] for alias, owner in arch.ties}
    added: dict[str, AddedTensor] = {}
    for name, indices in tokens.items():
        if name in skipped:
            continue
        module = _module_of_tokens(arch, name)
        rows, width = module.shape("weight")
        if any(not 0 <= i < rows for i in indices):
            raise InputError("trainable_token_indices", list(indices), f"accepted: token ids from 0 to {rows - 1}")
        # A tied head takes the embedding's adapter; where the class registers it first (XLM-RoBERTa), it owns the name.
        owner = owners.get(module.name, module.name) if module.name == arch.input_embedding else module.name
        place = module.name if any(owner.endswith(other) for other in tokens) else owner
        added[place] = AddedTensor(f"{place}.token_adapter.trainable_tokens_delta", (len(indices), width))
    return tuple(added.values())


def token_originals(deltas: Iterable[AddedTensor]) -> tuple[AddedBuffer, ...]:
    """The rows that the deltas replace, which peft keeps as a buffer beside each (`trainable_tokens_original`)."""
    return tuple(AddedBuffer(d.name.replace("_delta", "_original"), d.shape, "adapter") for d in deltas)


def _module_of_tokens(arch: Architecture, name: str) -> Module:
    """The one module whose name ends with `name`. Raises NeedsPeftError if several do, because peft wraps each of them."""
    matching = [m for m in arch.modules if m.name.endswith(name)]
    if not matching:
        raise InputError("trainable_token_indices", name, f"no module has this name; {_near(arch, name)}")
    if sum(m.copies for m in matching) > 1:
        raise NeedsPeftError(f"trainable_token_indices of {name!r}, which matches several modules")
    return matching[0]


def _tied_to_embedding(arch: Architecture) -> frozenset[str]:
    """Names of the other modules that share the input embedding's weight."""
    embedding = f"{arch.input_embedding}.weight"
    owner = dict(arch.ties).get(embedding, embedding)
    group = {owner, *(alias for alias, source in arch.ties if source == owner)} - {embedding}
    return frozenset(name.rpartition(".")[0] for name in group)


def refuse_both(arch: Architecture, saved: Iterable[str], tokens: TokenIndices) -> None:
    """Raise RefusedError if an embedding is saved as a whole and by its rows, NeedsPeftError if that is left open."""
    embeddings = {*EMBEDDINGS, (arch.output_embedding or "").rpartition(".")[2]}
    if isinstance(tokens, tuple) and tokens and any(name.rpartition(".")[2] in embeddings for name in saved):
        raise NeedsPeftError("trainable_token_indices beside an embedding in modules_to_save")
    both = set(saved) & set(tokens) if isinstance(tokens, Mapping) else set()
    if both:
        raise RefusedError(
            f"trainable_token_indices: {both.pop()} is already in modules_to_save; peft accepts only one of the two"
        )


def _roots(arch: Architecture, suffix: str) -> list[tuple[str, frozenset[int] | None]]:
    """Templates of the modules whose name ends with `wanted`, and the layers where it does (None: all)."""
    roots: list[tuple[str, frozenset[int] | None]] = []
    for template in dict.fromkeys((*(m.name for m in arch.modules), *sorted(arch.containers))):
        if template.endswith(suffix):
            roots.append((template, None))
        elif "{}" in template and any(char.isdigit() for char in suffix):
            under = [m for m in arch.modules if m.name == template or m.name.startswith(template + ".")]
            layers = {i for m in under for i in m.layers or () if template.replace("{}", str(i)).endswith(suffix)}
            if layers:
                roots.append((template, frozenset(layers)))
    return roots


def _copies(arch: Architecture, root: str, module: Module) -> list[AddedTensor]:
    inner = module.name[len(root) :]
    owners = dict(arch.ties)
    return [
        AddedTensor(
            f"{root}.modules_to_save{inner}.{param}", shape, module.layers, dtype="base", in_embedding=module.kind == "Embedding"
        )
        for param, shape in module.params
        if not owners.get(f"{module.name}.{param}", "").startswith(root + ".")  # a tie inside the copy stays a tie
    ]


def _near(arch: Architecture, name: str) -> str:
    leaves = sorted({m.leaf for m in arch.modules})
    return near_names((name,), leaves)
